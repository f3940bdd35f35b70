"""Small batches at equal seconds: the loss after some steps of fvp, and of Adam in that time.

    python benchmarks/equal_seconds.py

Handwritten digits in batches of 64, ten seeds, the loss of all training data, fvp with nothing set.
Adam runs with each learning rate of a grid for as long as fvp's steps took with that seed, in the
same process; its tuned learning rate is the one with the lowest median. Neither compilation nor
evaluation is on the clock; making the batches is, for both.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import jax
import numpy as np
from _measure import timed
from peers import Method, adam, natural_gradient
from tasks import TASKS, Task
from tqdm import tqdm

LEARNING_RATES = (0.01, 0.015, 0.02, 0.025, 0.03, 0.04)
BETWEEN = 10  # steps from one look at the clock to the next


def train(
    task: Task, method: Method, seed: int, steps: float = math.inf, seconds: float = math.inf
) -> tuple[Any, int, float]:
    """The parameters, steps and seconds when the first of the two limits is reached."""
    params, batches = jax.tree.map(jax.numpy.array, task.init(seed)), task.batches(seed)
    state = method.init(params, next(task.batches(seed)))

    def some_steps(params: Any, state: Any) -> tuple[Any, Any]:
        for _ in range(BETWEEN):
            params, state = method.step(params, state, batches)
        return params, state

    count, elapsed = 0, 0.0
    while count < steps and elapsed < seconds:
        (params, state), taken = timed(some_steps, params, state)
        count, elapsed = count + BETWEEN, elapsed + taken
    return params, count, elapsed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200, help="of fvp, a multiple of ten")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    task = TASKS["digits-64"]()
    loss, data = jax.jit(task.loss), jax.device_put(task.data)
    ours = natural_gradient(task)
    peers = {rate: adam(task, rate) for rate in LEARNING_RATES}
    for method in (ours, *peers.values()):
        train(task, method, 0, steps=BETWEEN)  # compiles

    losses: dict[Any, list[float]] = {name: [] for name in ("fvp", *LEARNING_RATES)}
    counts, times = [], []
    for seed in tqdm(range(arguments.seeds), unit="seed"):
        params, _, seconds = train(task, ours, seed, steps=arguments.steps)
        losses["fvp"].append(float(loss(params, *data)))
        times.append(seconds)
        for rate, method in peers.items():
            params, count, _ = train(task, method, seed, seconds=seconds)
            losses[rate].append(float(loss(params, *data)))
            counts.append(count)

    print(f"{arguments.steps} steps of fvp, {np.median(times):.2f} s, ", end="")
    print(f"are {np.median(counts):.0f} of Adam (medians)")
    print(f"{'':12}{'median':>10}{'worst':>10}   fvp is lower with")
    for name, values in losses.items():
        won = sum(a < b for a, b in zip(losses["fvp"], values, strict=True))
        label, suffix = ("fvp", "") if name == "fvp" else (f"Adam {name}", f"   {won} seeds")
        print(f"{label:12}{np.median(values):10.1e}{max(values):10.1e}{suffix}")
    best = min(LEARNING_RATES, key=lambda rate: np.median(losses[rate]))
    print(f"tuned: Adam {best}")


if __name__ == "__main__":
    main()
