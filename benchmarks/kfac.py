"""Layer capture in numbers: cost in gradients, K-FAC on digits, and CG preconditioned by it.

    python benchmarks/kfac.py

Flops come from the compiled programs, so they mean the same on every machine; LAPACK's eigen- and
Cholesky decompositions are not counted in them. Seconds are of one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import TASKS

import fvp

HEAD = fvp.Softmax()


def mlp(sizes: list[int], seed: int = 0) -> Any:
    """Parameters of a tanh network with standard deviation 1/sqrt(fan-in)."""
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), jnp.float32), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Tanh network."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def costs() -> dict[str, dict[str, float]]:
    """Flops in gradients, temporary memory and compile time, on 784-512-512-10 at batch 256."""
    rng = np.random.default_rng(0)
    params = mlp([784, 512, 512, 10])
    x = jnp.asarray(rng.normal(size=(256, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, 256))
    key = jax.random.key(0)
    gradient = jax.grad(lambda p, x: HEAD.nll(apply(p, x), y).mean())
    tx = fvp.scale_by_kfac(apply, HEAD)

    def dual(p: Any, x: jax.Array) -> Any:
        return fvp.solve_dual(fvp.fisher(apply, HEAD, p, x), p, 1e-3)

    def step(p: Any, x: jax.Array) -> Any:
        return tx.update(gradient(p, x), tx.init(p), p, batch=x, targets=y)

    programs: dict[str, Callable[..., Any]] = {
        "gradient": gradient,
        "diagonal": lambda p, x: fvp.fisher_diagonal(apply, HEAD, p, x),
        "diagonal, Monte Carlo": lambda p, x: fvp.fisher_diagonal(apply, HEAD, p, x, key=key),
        "kfac": lambda p, x: fvp.kfac(apply, HEAD, p, x),
        "kfac, Monte Carlo": lambda p, x: fvp.kfac(apply, HEAD, p, x, key=key),
        "dual solve": dual,
        "scale_by_kfac step": step,
    }
    rows: dict[str, dict[str, float]] = {}
    for name, program in programs.items():
        start = time.perf_counter()
        compiled = jax.jit(program).lower(params, x).compile()
        seconds = time.perf_counter() - start
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        flops = float(analysis["flops"]) if analysis else float("nan")
        rows[name] = {
            "gradients": flops / rows["gradient"]["flops"] if rows else 1.0,
            "flops": flops,
            "MiB": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
            "compile_seconds": seconds,
        }
    return rows


def digits(steps: int = 20) -> list[float]:
    """Training loss of 64-128-10 on scikit-learn's digits, full batch, all defaults."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(labels)
    params, losses = mlp([64, 128, 10]), []
    tx = fvp.scale_by_kfac(apply, HEAD)
    loss = jax.jit(lambda p: HEAD.nll(apply(p, x), y).mean())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=x, targets=y)
        return jax.tree.map(jnp.subtract, params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
        losses.append(float(loss(params)))
    return losses


def preconditioned_cg(name: str, maxiter: int = 600) -> list[dict[str, float]]:
    """CG iterations to 1e-3 on a task of tasks.py, with and without K-FAC, as training goes on."""
    task = TASKS[name]()
    head = {"softmax": fvp.Softmax(), "sigmoid": fvp.Sigmoid()}[task.head]
    model_fn, batches = task.model_fn, task.batches(0)
    tx = fvp.natural_gradient(1.0, model_fn, head)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        inputs, targets, _ = batch
        operator = fvp.fisher(model_fn, head, params, inputs)
        _, gradient = operator.value_and_grad(targets)
        data = {"operator": operator, "batch": inputs, "targets": targets}
        updates, state = tx.update(gradient, state, params, **data)
        return jax.tree.map(jnp.add, params, updates), state

    @jax.jit
    def iterations(params: Any, batch: Any, damping: Any) -> Any:
        inputs, targets, _ = batch
        operator = fvp.fisher(model_fn, head, params, inputs)
        _, gradient = operator.value_and_grad(targets)
        factors = fvp.kfac(model_fn, head, params, inputs, key=jax.random.key(0))
        options: dict[str, Any] = {"damping": damping, "tol": 1e-3, "maxiter": maxiter}
        _, plain = fvp.cg(operator, gradient, **options)
        _, kfac = fvp.cg(operator, gradient, M=factors.inverse(damping), **options)
        return plain.iterations, kfac.iterations

    params = jax.tree.map(jnp.asarray, task.init(0))
    state, rows = tx.init(params), []
    for trained in (0, 20):
        for _ in range(trained):
            params, state = step(params, state, next(batches))
        batch = next(batches)
        for damping in (1e-4, 1e-6):
            plain, kfac = map(int, iterations(params, batch, damping))
            setting = {"task": name, "steps": trained, "damping": damping}
            rows.append({**setting, "plain": plain, "kfac": kfac})
            print(
                f"{name} after {trained} steps, damping {damping:.0e}: CG in {plain} iterations"
                f" (at most {maxiter}), with K-FAC {kfac}",
                flush=True,
            )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/kfac.json"))
    arguments = parser.parse_args()
    table = costs()
    print(f"{'program':24}{'gradients':>10}{'MiB':>8}{'compile s':>11}")
    for name, row in table.items():
        print(
            f"{name:24}{row['gradients']:>10.2f}{row['MiB']:>8.0f}{row['compile_seconds']:>11.1f}"
        )
    losses = digits()
    print(f"digits, full batch: {losses[9]:.1e} after 10 steps, {losses[19]:.1e} after 20")
    solves = [row for name in ("curves", "transformer") for row in preconditioned_cg(name)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"costs": table, "digits": losses, "cg": solves}, indent=1)
    )
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
