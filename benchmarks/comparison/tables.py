"""Tables of what compare.py measured, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from comparison.program import MEASURES, SAMPLED

OWN = "fvp"
SAME = 1e-3  # relative difference up to which two results are the same
TARGET = 1.03  # of a product by fvp, in products by hand
Record = dict[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded) + "\n"


def measured(record: Record, measure: str) -> dict[str, Record]:
    """The rows of a measure that have seconds, by library."""
    rows = {name: lib["measures"].get(measure, {}) for name, lib in record["libraries"].items()}
    return {name: row for name, row in rows.items() if row.get("seconds")}


def is_other(measure: str, row: Record) -> bool:
    """Whether a result is not fvp's."""
    return measure not in SAMPLED and not row.get("difference", 0.0) <= SAME


def ratio(row: Record, unit: Record) -> np.ndarray:
    """Quartiles over the rounds of one time over another."""
    both = zip(row["seconds"], unit["seconds"], strict=False)
    return np.quantile([a / b for a, b in both], (0.25, 0.5, 0.75))


def best_other(record: Record, measure: str) -> tuple[str, np.ndarray] | None:
    """The fastest library but fvp, and fvp's time over its time, in quartiles."""
    rows = measured(record, measure)
    others = {k: r for k, r in rows.items() if k != OWN and not is_other(measure, r)}
    if OWN not in rows or not others:
        return None
    name = min(others, key=lambda name: statistics.median(others[name]["seconds"]))
    return name, ratio(rows[OWN], others[name])


def errors(record: Record) -> str:
    """A line for each reason why something did not run."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, library in record["libraries"].items():
        if "error" in library:
            found[name, library["error"]] = ["everything"]
        for measure, row in library["measures"].items():
            if reason := row.get("error", row.get("skipped")):
                found.setdefault((name, reason), []).append(measure)
    return "".join(
        f"- {name}, {'; '.join(measures)}: {reason}\n" for (name, reason), measures in found.items()
    )


def ratios(results: Record) -> str:
    """For each workload times in those of fvp, with what failed below."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    text = (
        f"Times of others in fvp's (above 1, fvp is faster), and fvp's time over the best other's"
        f" with quartiles; * computes another result. The gradients of all but PyTorch are the"
        f" same program: what they differ by is noise. {machine['cpu']}, {results['threads']}"
        f" thread(s) each, load {machine['load']:.1f}, Python {machine['python']}, {versions},"
        f" commit {machine['commit']}, {machine['date'][:10]}.\n"
    )
    for workload, record in results["workloads"].items():
        present = {name for measure in MEASURES for name in measured(record, measure)}
        libraries = [name for name in record["libraries"] if name in present]
        table = []
        for measure in MEASURES:
            rows = measured(record, measure)
            if OWN not in rows:
                continue
            cells = [f"{1e3 * statistics.median(rows[OWN]['seconds']):.3g} ms"]
            for name in (name for name in libraries if name != OWN):
                number = f"{ratio(rows[name], rows[OWN])[1]:.2f}" if name in rows else "-"
                star = " *" if name in rows and is_other(measure, rows[name]) else ""
                cells.append(number + star)
            best = best_other(record, measure)
            low, middle, high = best[1] if best else (0, 0, 0)
            last = f"{middle:.2f} ({low:.2f}-{high:.2f}) {best[0]}" if best else "-"
            table.append([measure, *cells, last])
        head = ["", OWN, *(n for n in libraries if n != OWN), "fvp / best other"]
        chip = record["libraries"].get(OWN, {}).get("device", "cpu")
        where = "" if chip == "cpu" else f", on one {chip}"
        text += f"\n## {workload}\n\n{record['description']}{where}\n\n{markdown(head, table)}\n"
        text += errors(record)
    return text


def details(results: Record) -> str:
    """For each workload a line for each measure and library."""
    head = ["measure", "library", "ms", "quartiles", "own gradients", "compile s", "Mflop", "MiB"]
    head += ["difference", "note"]
    text = "".join(f"- {name}: {meaning}\n" for name, meaning in MEASURES.items())
    for workload, record in results["workloads"].items():
        lines = []
        for measure in MEASURES:
            for name, row in measured(record, measure).items():
                gradient = record["libraries"][name]["measures"].get("gradient", {})
                low, middle, high = np.quantile(row["seconds"], (0.25, 0.5, 0.75)) * 1e3
                unit = f"{ratio(row, gradient)[1]:.2f}" if gradient.get("seconds") else "-"
                number = lambda key, scale, row=row: (
                    f"{row[key] / scale:.3g}" if key in row else "-"
                )
                difference = number("difference", 1) + " sampled" * (measure in SAMPLED)
                times = [f"{middle:.3g}", f"{low:.3g} to {high:.3g}", unit]
                compiler = [number("compile_seconds", 1), number("flops", 1e6)]
                memory = number("temporary_bytes", 2**20)
                lines.append([measure, name, *times, *compiler, memory, difference, row["note"]])
        text += f"\n## {workload}\n\n{markdown(head, lines)}\n{errors(record)}"
    return text


def slower(results: Record) -> str:
    """Where fvp is behind: a library faster than it, or its product over the target."""
    lines = []
    for workload, record in results["workloads"].items():
        for measure in MEASURES:
            best = best_other(record, measure)
            if best and best[1][1] > 1:
                low, middle, high = best[1]
                spread = f"{middle:.2f} ({low:.2f}-{high:.2f})"
                remark = "in the spread" if low <= 1 else ""
                if measure == "product" and middle > TARGET:
                    remark = f"over {TARGET}"
                lines.append([workload, measure, best[0], spread, remark])
    head = ["workload", "measure", "faster than fvp", "by", ""]
    return markdown(head, lines) if lines else "No library is faster than fvp in any measure.\n"
