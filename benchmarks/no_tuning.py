"""The natural gradient with nothing set, beside tuned optimizers, on nine tasks.

    python benchmarks/no_tuning.py
    python benchmarks/no_tuning.py --tasks digits,diabetes --peers none --seeds 1 --scale 0.1

Adam and SGD with momentum get the learning rate of the lowest final loss, kfac-jax and somax their
documented options and the best of a grid, all searched on seed 0. Adam runs the task's steps; every
other optimizer as many, or twice Adam's seconds, whichever ends first; fvp has ten times as long,
to count its steps. What counts is the way to Adam's final loss. Each run is a process and a file:
an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from statistics import median_high, median_low
from typing import Any

import matplotlib
import numpy as np
from _environments import environment
from peers import PEERS, candidates
from tasks import TASKS
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATIENCE = 2  # times Adam's seconds
TIMEOUT = 1800  # seconds of one run, compilation and evaluations included
Record = dict[str, Any]  # of a run: options, seed, and either error or what peers.py printed


class Runner:
    """Runs of one task, each kept in a file."""

    def __init__(self, task: str, steps: int, output: pathlib.Path, progress: tqdm) -> None:
        self.task, self.steps, self.output, self.progress = task, steps, output, progress

    def run(
        self,
        method: str,
        options: Record | None = None,
        seed: int = 0,
        seconds: float = math.inf,
        python: str = sys.executable,
    ) -> Record:
        """What peers.py printed, now or when it ran before with as many steps."""
        options = options or {}
        record = {"options": options, "seed": seed, "steps": self.steps}
        words = [method, *(f"{key}={value}" for key, value in options.items()), f"seed={seed}"]
        path = self.output / "runs" / self.task / ("_".join(words) + ".json")
        if path.exists() and record.items() <= (kept := json.loads(path.read_text())).items():
            return kept
        self.progress.set_description(" ".join([self.task, *words]))
        command = [python, str(pathlib.Path(__file__).with_name("peers.py"))]
        command += [f"--task={self.task}", f"--method={method}", f"--options={json.dumps(options)}"]
        command += [f"--seed={seed}", f"--steps={self.steps}", f"--seconds={seconds}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            lines = done.stdout.splitlines()
            died = {"error": f"exit status {done.returncode}"}
            record |= json.loads(lines[-1]) if lines else died
        except subprocess.TimeoutExpired:
            record |= {"error": f"not finished after {TIMEOUT} s"}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        return record

    def seeds(self, count: int, *arguments: Any, **limits: Any) -> list[Record]:
        """One run per seed, or the first alone where it fails."""
        first = self.run(*arguments, **limits)
        if "error" in first:
            return [first]
        return [first, *(self.run(*arguments, seed=k, **limits) for k in range(1, count))]


def final_loss(record: Record) -> float:
    """The last loss, or infinity where there is none."""
    loss = record["curve"][-1][-1] if "error" not in record else math.inf
    return loss if math.isfinite(loss) else math.inf


def tuned_learning_rate(run: Callable[[Record], Record], low: int, high: int) -> Record:
    """Of 10^(k/2) the one with the lowest final loss; the grid grows until it is inside."""
    while True:
        grid = [{"learning_rate": float(f"{10 ** (k / 2):.0e}")} for k in range(low, high + 1)]
        records = [run(options) for options in grid]
        if all("error" in record for record in records):
            raise RuntimeError(records[0]["error"])
        best = int(np.argmin([final_loss(record) for record in records]))
        if 0 < best < len(grid) - 1:
            return grid[best]
        low, high = low - (best == 0), high + (best > 0)


def contest(runner: Runner, peers: list[str], seeds: int) -> dict[str, list[Record]]:
    """All runs of one task that the table shows, by row."""

    def first_order(method: str, low: int, high: int, **limits: Any) -> list[Record]:
        run = lambda options: runner.run(method, options, **limits)
        return runner.seeds(seeds, method, tuned_learning_rate(run, low, high), **limits)

    adam = first_order("adam", -6, -2)
    seconds = PATIENCE * median_high(record["curve"][-1][1] for record in adam)
    rows = {
        "fvp": runner.seeds(seeds, "fvp", seconds=10 * seconds),
        "Adam": adam,
        "SGD": first_order("sgd", -4, 0, seconds=seconds),
    }
    for peer in peers:
        try:
            python = environment(peer, PEERS[peer], runner.output)
            limits: Any = {"seconds": seconds, "python": python}
        except RuntimeError as error:
            rows[peer] = [{"options": {}, "error": f"not installed: {error}"}]
            continue
        grid = candidates(peer, TASKS[runner.task]())
        losses = [final_loss(runner.run(peer, options, **limits)) for options in grid]
        rows[peer] = runner.seeds(seeds, peer, grid[0], **limits)
        rows[f"{peer}, tuned"] = runner.seeds(seeds, peer, grid[int(np.argmin(losses))], **limits)
    return rows


def measures(records: list[Record], target: float) -> Record:
    """Medians over the seeds, where finite: the final loss, and the way to the target."""
    setting = " ".join(f"{key}={value}" for key, value in records[0]["options"].items())
    errors = [record["error"] for record in records if "error" in record]
    if errors:
        return {"setting": setting, "error": errors[0]}
    never = (math.inf, math.inf, math.inf, math.inf)
    curves = [record["curve"] for record in records]
    reached = [next((point for point in c if point[-1] <= target), never) for c in curves]
    steps, seconds, products, _ = map(median_low, zip(*reached, strict=True))
    medians = {
        "loss": median_high(map(final_loss, records)),
        "steps": steps,
        "seconds": seconds,
        "products": products,
        "compile": median_low(record["compile_seconds"] for record in records),
    }
    return {
        "setting": setting,
        **{name: value for name, value in medians.items() if math.isfinite(value)},
        "diverged": sum(not final_loss(record) <= record["curve"][0][-1] for record in records),
    }


def table(results: dict[str, dict[str, Record]]) -> str:
    """Markdown with a line per task and method."""
    columns = ("loss", "steps", "seconds", "products", "compile", "diverged")
    lines = [["task", "method", *columns, "setting"]]
    for task, rows in results.items():
        for name, row in rows.items():
            cells = [f"{row[column]:.3g}" if column in row else "-" for column in columns]
            lines.append([task, name, *cells, f"{row['setting']} {row.get('error', '')}".strip()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def summary(results: dict[str, dict[str, Record]], peers: list[str]) -> str:
    """On how many tasks fvp is first at Adam's final loss."""

    def wins(measure: str, names: tuple[str, ...], factor: float = 1.0) -> str:
        # Nobody but fvp had longer.
        limit = lambda rows: PATIENCE * rows["Adam"][measure] if measure == "seconds" else math.inf
        best = lambda rows: min(rows.get(name, {}).get(measure, limit(rows)) for name in names)
        ours = [rows["fvp"].get(measure, math.inf) for rows in results.values()]
        theirs = [best(rows) for rows in results.values()]
        won = sum(factor * a < b for a, b in zip(ours, theirs, strict=True))
        return f"{won} of {len(results)} tasks"

    return "\n".join(
        [
            "To Adam's final loss fvp with nothing set takes",
            f"- fewer steps than tuned Adam on {wins('steps', ('Adam',))},",
            f"- at most a tenth of its steps on {wins('steps', ('Adam',), 10)},",
            f"- fewer seconds than tuned Adam on {wins('seconds', ('Adam',))},",
            *(
                f"- fewer seconds than {peer} at its best on"
                f" {wins('seconds', (peer, f'{peer}, tuned'))},"
                for peer in peers
            ),
            "compilation not counted.",
        ]
    )


def draw(task: str, rows: dict[str, list[Record]], target: float, path: pathlib.Path) -> None:
    """Loss against steps, products and seconds, a line per seed; dotted where Adam ends."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    start = 1.0
    for i, (name, records) in enumerate(rows.items()):
        for record in (r for r in records if "error" not in r):
            steps, seconds, products, loss = np.array(record["curve"], float).T
            start = loss[0]
            label = name if record is records[0] else None
            for axis, x in zip(axes, (steps, steps + products, seconds), strict=True):
                axis.plot(x[1:], loss[1:], f"C{i}", label=label, alpha=0.8, linewidth=1.2)
                label = None
    for axis, x in zip(axes, ("steps", "gradients and products", "seconds"), strict=True):
        axis.axhline(target, color="gray", linestyle=":")
        axis.set(xlabel=x, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="training loss")
    axes[0].set_ylim(top=2 * start)
    figure.legend(loc="outside lower center", ncols=len(rows), frameon=False)
    figure.suptitle(task)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, or none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/no_tuning"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    peers = [] if arguments.peers == "none" else arguments.peers.split(",")
    if unknown := {*tasks} - {*TASKS} | {*peers} - {*PEERS}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; see --help")
    if arguments.fresh:
        shutil.rmtree(arguments.output / "runs", ignore_errors=True)
    results: dict[str, dict[str, Record]] = {}
    for task in (progress := tqdm(tasks, unit="task")):
        steps = max(1, round(arguments.scale * TASKS[task]().steps))
        runner = Runner(task, steps, arguments.output, progress)
        rows = contest(runner, peers, arguments.seeds)
        target = median_high(map(final_loss, rows["Adam"]))
        results[task] = {name: measures(records, target) for name, records in rows.items()}
        draw(task, rows, target, arguments.output / f"{task}.png")
        (arguments.output / "results.json").write_text(json.dumps(results, indent=1))
    report = f"{table(results)}\n\n{summary(results, peers)}\n"
    (arguments.output / "summary.md").write_text(report)
    print(f"{report}\nsaved {arguments.output}")


if __name__ == "__main__":
    main()
