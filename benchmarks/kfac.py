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


def autoencoder_cg(dampings: tuple[float, ...] = (1e-4, 1e-5, 1e-6)) -> list[dict[str, float]]:
    """CG iterations to 1e-3 on a deep autoencoder of curve images, with and without K-FAC."""
    rng = np.random.default_rng(0)
    sizes = [196, 100, 50, 25, 6, 25, 50, 100, 196]
    t = np.linspace(0, 1, 60)
    points = rng.uniform(size=(1000, 3, 2))
    curve = np.einsum("bk,nkd->nbd", np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1), points)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 14)] * 2, indexing="ij"), -1).reshape(-1, 2)
    distance = ((curve[:, :, None] - grid[None, None]) ** 2).sum(-1).min(1)
    x = jnp.asarray(np.exp(-distance / 0.003), jnp.float32)
    head, params = fvp.Sigmoid(), mlp(sizes)
    tx = fvp.scale_by_kfac(apply, head)
    rows = []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: head.nll(apply(p, x), x).mean())(params)
        updates, state = tx.update(gradient, state, params, batch=x, targets=x)
        return jax.tree.map(jnp.subtract, params, updates), state

    state = tx.init(params)
    for trained in (0, 10):
        for _ in range(trained):
            params, state = step(params, state)
        operator = fvp.fisher(apply, head, params, x)
        _, gradient = operator.value_and_grad(x)
        factors = fvp.kfac(apply, head, params, x, key=jax.random.key(0))
        for damping in dampings:
            options: dict[str, Any] = {"damping": damping, "tol": 1e-3, "maxiter": 2000}
            _, plain = fvp.cg(operator, gradient, **options)
            _, kfac = fvp.cg(operator, gradient, M=factors.inverse(damping), **options)
            rows.append(
                {
                    "steps": trained,
                    "damping": damping,
                    "plain": int(plain.iterations),
                    "kfac": int(kfac.iterations),
                }
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
    solves = autoencoder_cg()
    for row in solves:
        print(
            f"autoencoder after {row['steps']} steps, damping {row['damping']:.0e}: CG in"
            f" {row['plain']} iterations, with K-FAC {row['kfac']}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"costs": table, "digits": losses, "cg": solves}, indent=1)
    )
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
