"""An environment's libraries on one workload, in a process that answers a line with a line.

A request names a method of `Worker` and its arguments; nothing but answers reaches standard output.
Preparing compiles and runs a measure once and saves the result; running times it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from comparison.program import ITERATIONS, MARGINAL, Program, Programs
from comparison.workloads import workload

SHORTEST = 0.03  # seconds that a timing lasts at least; shorter programs repeat
LONG = 2.0  # seconds of a program that isn't warmed up,
LONGEST = 8.0  # and of one whose first run is all that is measured
Run = Callable[..., Any]


def flat(value: Any) -> np.ndarray | None:
    """The numbers of an array, or of a dict of arrays in the order of the names."""
    if isinstance(value, dict):
        return np.concatenate([np.ravel(np.asarray(value[name])) for name in sorted(value)])
    return np.ravel(np.asarray(value)) if hasattr(value, "__array__") else None


def timed(call: Run) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def compiled(program: Program, count: int | None) -> tuple[Run, dict[str, Any]]:
    """A call of so many products, and what the compiler knows; of PyTorch programs the call."""
    args = program.args()
    counts = () if count is None else (count,)
    if "jax" not in sys.modules:
        return lambda *other: program.function(*args, *(other or counts)), {}
    import jax

    jax.block_until_ready(args)
    start = time.perf_counter()
    executable = jax.jit(program.function).lower(*args, *counts).compile()
    known: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    analysis, memory = executable.cost_analysis(), executable.memory_analysis()
    if analysis and not counts:  # of a loop the compiler counts the body once
        known["flops"] = float(analysis.get("flops", np.nan))
    if memory:
        known["temporary_bytes"] = float(memory.temp_size_in_bytes)
    return lambda *other: jax.block_until_ready(executable(*args, *(other or counts))), known


def device() -> str:
    """The chip that the programs run on."""
    if "jax" not in sys.modules:
        return "cpu"  # the programs of PyTorch are on no other
    import jax

    return jax.devices()[0].device_kind


class Worker:
    """The programs of an environment's libraries, and those that are ready to run."""

    def __init__(self, name: str, preset: str) -> None:
        self.work = workload(name, preset)
        self.programs: dict[str, Programs] = {}
        # By library and measure: a call, its repeats, and the further products of a loop.
        self.ready: dict[tuple[str, str], tuple[Run, int, int]] = {}

    def load(self, library: str, module: str, function: str, packages: list[str]) -> dict[str, Any]:
        """Measures of a library, or why it runs none; its versions, and the device."""
        make = getattr(importlib.import_module(f"comparison.{module}"), function)
        self.programs[library] = programs = make(self.work)
        reasons = {k: p if isinstance(p, str) else None for k, p in programs.items()}
        versions = {name: importlib.metadata.version(name) for name in packages}
        return {"measures": reasons, "versions": versions, "device": device()}

    def prepare(self, library: str, measure: str, path: str) -> dict[str, Any]:
        """Compiles and runs once; saves the numbers of the result, if it has some."""
        program = self.programs[library][measure]
        assert not isinstance(program, str)
        call, known = compiled(program, 1 if measure == MARGINAL else None)
        result, seconds = timed(call)
        if (values := flat(program.value(result))) is not None:
            np.save(path, values)
        known["note"] = program.note
        if seconds > LONGEST and measure != MARGINAL:
            return {**known, "seconds": [seconds]}
        seconds = timed(call)[1] if seconds < LONG else seconds
        more = 2 if seconds > LONG / ITERATIONS else ITERATIONS
        self.ready[library, measure] = call, max(1, round(SHORTEST / seconds)), more
        return known

    def run(self, library: str, measure: str) -> dict[str, float]:
        """Seconds of the wall and of all threads."""
        call, repeats, more = self.ready[library, measure]
        if repeats > 1:
            call()  # others had the caches since
        clocks = lambda: np.array([time.perf_counter(), time.process_time()])
        start = clocks()
        for _ in range(repeats):
            call()
        spent = (clocks() - start) / repeats
        if measure == MARGINAL:
            start = clocks()
            call(1 + more)
            spent = (clocks() - start - spent) / more
        return {"seconds": float(spent[0]), "cpu_seconds": float(spent[1])}


def main() -> None:
    """Command line."""
    name, preset = sys.argv[1:]
    worker = Worker(name, preset)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            reply = {"error": f"{type(error).__name__}: {first[:200]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
