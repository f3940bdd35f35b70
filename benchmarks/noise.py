"""Mini-batches: fvp with nothing set beside tuned optimizers.

    python benchmarks/noise.py
    python benchmarks/noise.py --tasks "images, noisy labels" factorisation --methods adam fvp

Each method takes the same number of batches. Printed is, for each method, the training loss on a
fixed evaluation set at the end, the worst of the seeds; the loss when it has had the CPU seconds
that Adam took for all of its steps, compilation not counted; and by a "!" where the loss was above
its start at any of the evaluations after the first twenty steps. Learning rates are chosen by the
final loss of the first seed, Adam's of six and the others' of four.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from noisy_tasks import DEVELOPMENT, VALIDATION, NoisyTask
from tqdm import tqdm

import fvp

TASKS = DEVELOPMENT | VALIDATION
EVALUATIONS = 50  # of a run, evenly spaced
Curve = list[tuple[int, float, float]]  # steps, CPU seconds, loss on the evaluation set


def kfac(task: NoisyTask) -> optax.GradientTransformation:
    """K-FAC with nothing set."""
    return optax.chain(fvp.scale_by_kfac(task.model_fn, task.head), optax.scale(-1.0))


def cosine(task: NoisyTask, rate: float) -> optax.GradientTransformation:
    """Adam whose learning rate falls to zero."""
    return optax.adam(optax.cosine_decay_schedule(rate, task.steps))


# For each method the transformations to try, of which the best counts.
METHODS: dict[str, Callable[[NoisyTask], list[optax.GradientTransformation]]] = {
    "adam": lambda task: [optax.adam(rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    "cosine adam": lambda task: [cosine(task, rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)],
    "muon": lambda task: [optax.contrib.muon(rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)],
    "fvp": lambda task: [fvp.natural_gradient(1.0, task.model_fn, task.head)],
    "K-FAC": lambda task: [kfac(task)],
}


def train(task: NoisyTask, tx: optax.GradientTransformation, seed: int) -> Curve:
    """The loss on the evaluation set along the way."""
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), task.init(seed))
    x, y = (jnp.asarray(v, jnp.int32 if v.dtype.kind == "i" else jnp.float32) for v in task.data)

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        return task.head.nll(task.model_fn(params, x), y).mean()

    @jax.jit
    def chunk(params: Any, state: Any, keys: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            params, state = carry
            rows = jax.random.randint(key, (task.batch_size,), 0, len(x))
            gradient = jax.grad(loss)(params, x[rows], y[rows])
            batch = {"batch": x[rows], "targets": y[rows]}
            updates, state = tx.update(gradient, state, params, **batch)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), keys)[0]

    evaluate = jax.jit(lambda params: loss(params, x[: task.evaluated], y[: task.evaluated]))
    state, size = tx.init(params), task.steps // EVALUATIONS
    keys = jax.random.split(jax.random.key(seed), (EVALUATIONS, size))
    compiled = chunk.lower(params, state, keys[0]).compile()
    jax.block_until_ready(compiled(params, state, keys[0]))  # a first run loads the program
    seconds, curve = 0.0, [(0, 0.0, float(evaluate(params)))]
    for i, some in enumerate(keys, 1):
        start = time.process_time()
        params, state = jax.block_until_ready(compiled(params, state, some))
        seconds += time.process_time() - start
        curve.append((i * size, seconds, float(evaluate(params))))
    return curve


def final(curve: Curve) -> float:
    """The last loss, or infinity where there is none."""
    return curve[-1][2] if math.isfinite(curve[-1][2]) else math.inf


def loss_at(curve: Curve, seconds: float) -> float:
    """The loss after so many seconds, or at the end where that was sooner."""
    return [loss for _, spent, loss in curve if spent <= seconds][-1]


def rises(curve: Curve) -> bool:
    """Whether the loss is above its start at some evaluation after twenty steps."""
    return any(not loss <= curve[0][2] for steps, _, loss in curve if steps >= 20)


def run(task: NoisyTask, method: str, seeds: int) -> list[Curve]:
    """The curves of every seed, with the setting that is best for the first."""
    candidates = METHODS[method](task)
    firsts = [train(task, tx, 0) for tx in candidates]
    best = int(np.argmin([final(curve) for curve in firsts]))
    return [firsts[best], *(train(task, candidates[best], seed) for seed in range(1, seeds))]


def cell(curves: list[Curve], seconds: float) -> str:
    """Worst final loss, worst loss at those seconds, and whether it rose above the start."""
    worst = max(map(final, curves))
    then = max(loss_at(curve, seconds) for curve in curves)
    return f"{worst:.3g}, {then:.3g}{'!' if any(map(rises, curves)) else ''}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/noise"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    methods = ["adam", *(name for name in arguments.methods if name != "adam")]
    print(f"| task | {' | '.join(methods)} |\n|{'---|' * (len(methods) + 1)}")
    for name in tqdm(arguments.tasks, unit="task"):
        curves = {method: run(TASKS[name](), method, arguments.seeds) for method in methods}
        seconds = max(curve[-1][1] for curve in curves["adam"])
        cells = [cell(curves[method], seconds) for method in methods]
        tqdm.write(f"| {name} | {' | '.join(cells)} |")
        path = arguments.output / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        path.write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
