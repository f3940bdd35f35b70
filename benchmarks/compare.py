"""fvp side by side with what a user would take instead, in one run.

    python benchmarks/compare.py
    python benchmarks/compare.py --setup            # only makes the environments of the peers
    python benchmarks/compare.py --workloads mlp --libraries "fvp,JAX by hand"

Every environment has a process: fvp's own, and one for each peer (made at the first run; PyTorch
with CUDA takes 6 GB, without where pip finds a wheel for CPUs). All compute the same measures from
the same numbers in float32, with as many threads, one where LAPACK is SciPy's. Rounds are
interleaved: what slows the machine slows all. Results are compared with fvp's. A library that can't
be installed, or fails, or isn't run on a measure, has a line that says why.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

from _environments import environment
from comparison.contest import FEWEST_ROUNDS, contest
from comparison.libraries import libraries
from comparison.plots import draw
from comparison.program import MEASURES
from comparison.tables import details, ratios, slower
from comparison.workloads import PRESETS
from tqdm import tqdm

Record = dict[str, Any]


def machine() -> Record:
    """What the numbers were taken with."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    output = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True).stdout
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    names = ("fvp", "jax", "jaxlib", "numpy")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": output("rev-parse", "--short", "HEAD").strip(),
        "changed files": len(output("status", "--porcelain", "--", "../fvp").splitlines()),
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def interpreters(names: list[str], folder: pathlib.Path, progress: tqdm) -> dict[str, Any]:
    """The interpreter of each library as a path, or the error that kept it from being installed."""
    chosen: dict[str, Any] = {}
    for name in names:
        library = libraries()[name]
        chosen[name] = pathlib.Path(sys.executable)
        if library.environment is not None:
            progress.set_description(f"environment of {name}")
            try:
                made = environment(library.environment, library.requirements, folder)
                chosen[name] = pathlib.Path(made)
            except RuntimeError as error:
                chosen[name] = f"not installed: {error}"
    return chosen


def write(results: Record, folder: pathlib.Path) -> None:
    """JSON, and Markdown for the documentation."""
    (folder / "compare.json").write_text(json.dumps(results, indent=1))
    (folder / "ratios.md").write_text(ratios(results))
    (folder / "details.md").write_text(details(results))


def main() -> None:
    """Command line."""
    known = libraries()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="large is for GPUs")
    parser.add_argument("--workloads", default=",".join(PRESETS["small"]))
    parser.add_argument("--libraries", default=",".join(known), help="comma-separated, fvp first")
    parser.add_argument("--measures", default=",".join(MEASURES), help="comma-separated names")
    parser.add_argument("--threads", type=int, default=1, help="of each process, which is pinned")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--seconds", type=float, default=30, help="of a workload's further rounds")
    parser.add_argument("--setup", action="store_true", help="make the environments, then stop")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compare"))
    arguments = parser.parse_args()
    names, workloads = arguments.libraries.split(","), arguments.workloads.split(",")
    measures = re.split(r",(?! )", arguments.measures)
    unknown = {*names} - {*known} | {*workloads} - {*PRESETS["small"]} | {*measures} - {*MEASURES}
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; see --help")
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    total = len(workloads) * (len(names) + arguments.rounds)
    with tqdm(total=0 if arguments.setup else total) as progress:
        chosen = interpreters(names, arguments.out, progress)
        results: Record = {"machine": machine(), "preset": arguments.preset, "workloads": {}}
        results |= {"threads": arguments.threads, "setup_seconds": time.perf_counter() - start}
        for name in [] if arguments.setup else workloads:
            cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
            with contest(name, arguments.preset, measures, cpus, arguments.out / "logs") as this:
                for library, python in chosen.items():
                    progress.set_description(f"{name}: {library}")
                    this.prepare(library, python)
                    progress.update()
                results["workloads"][name] = this.record
                begin = time.perf_counter()
                for count in range(arguments.rounds):
                    progress.set_description(f"{name}: round {count + 1}")
                    if count < FEWEST_ROUNDS:  # the slow ones run in these, however long they take
                        begin = time.perf_counter()
                    if time.perf_counter() < begin + arguments.seconds:
                        this.round(count)
                        write(results, arguments.out)
                    progress.update()
            draw(name, this.record, arguments.out / f"{name}.png")
        results["total_seconds"] = time.perf_counter() - start
    failed = {name: error for name, error in chosen.items() if isinstance(error, str)}
    print(*(f"{name}: {error}" for name, error in failed.items()), sep="\n")
    if not arguments.setup:
        write(results, arguments.out)
        print(f"{ratios(results)}\n{slower(results)}\nsaved {arguments.out}")


if __name__ == "__main__":
    main()
