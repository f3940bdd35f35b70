"""A picture of a workload: the time of every measure with every library."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

import matplotlib

from comparison.program import MEASURES
from comparison.tables import OWN, is_other, measured

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

# A colour is a library's in every picture.
NAMES = (OWN, "JAX by hand", "JAX textbook", "kfac-jax", "somax", "laplax", "netket")
NAMES += ("netket dense", "nlls-gram", "randngd", "curvlinops", "BackPACK")
COLORS: dict[str, str] = dict(
    zip(NAMES, ["black", *(f"C{i}" for i in range(10)), "gold"], strict=True)
)


def draw(workload: str, record: dict[str, Any], path: pathlib.Path) -> None:
    """Medians in gradients of fvp's environment, with quartiles; pale where results differ."""
    table = {measure: measured(record, measure) for measure in MEASURES}
    table = {measure: rows for measure, rows in table.items() if rows}
    if OWN not in table.get("gradient", {}):
        return
    unit = statistics.median(table["gradient"][OWN]["seconds"])
    bars = sum(map(len, table.values())) + len(table)
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.17 * bars), layout="constrained")
    y, ticks, seen = 0.0, [], []
    for measure, rows in table.items():
        top = y
        for name, row in rows.items():
            seconds = sorted(x / unit for x in row["seconds"])
            middle = statistics.median(seconds)
            low, high = seconds[len(seconds) // 4], seconds[-1 - len(seconds) // 4]
            pale = 0.35 if is_other(measure, row) else 1.0
            axis.barh(y, middle, 0.9, color=COLORS[name], alpha=pale)
            axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="gray", lw=1)
            axis.text(1.04 * high, y, f"{middle:.3g}", va="center", fontsize=7)
            seen.append(name)
            y += 1
        ticks.append(((top + y - 1) / 2, measure))
        axis.axhline(y, color="lightgray", lw=0.6)
        y += 1
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axis.set(xscale="log", xlabel="gradients (of JAX, in fvp's environment)", ylim=(y - 0.5, -1))
    axis.margins(x=0.08)
    axis.axvline(1, color="lightgray", lw=0.8, zorder=0)
    handles = [Patch(color=COLORS[name], label=name) for name in NAMES if name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{workload}: {record['description']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
