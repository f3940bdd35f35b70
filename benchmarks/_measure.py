"""Seconds of what the benchmarks run: always until the results are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def timed(
    function: Callable[..., Any], *args: Any, clock: Callable[[], float] = time.perf_counter
) -> tuple[Any, float]:
    """The result of one call, and its seconds by ``clock``: of the wall, or of the process."""
    start = clock()
    result = jax.block_until_ready(function(*args))
    return result, clock() - start


def median_seconds(
    programs: Mapping[str, Callable[..., Any]],
    args: Sequence[Any],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each program on the same arguments.

    Each runs once uncounted; the repeats of all are interleaved, so that a machine that slows down
    slows all of them.
    """
    for program in programs.values():
        jax.block_until_ready(program(*args))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seconds[name].append(timed(program, *args, clock=clock)[1])
    return {name: float(np.median(values)) for name, values in seconds.items()}
