"""What one product costs inside conjugate gradients, in gradients: linearised once, or each time.

    python benchmarks/products.py

"fvp" is `fvp.cg` on an operator of `fvp.fisher`; "re-linearising" is the same solve
on a function that calls `jax.jvp` and `jax.vjp` anew for every product. Times are CPU time of the
process (all threads), medians of interleaved repeats, with CG's own vector arithmetic included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _measure import median_seconds

import fvp

HEAD = fvp.Softmax()


def mlp(key: jax.Array) -> tuple[Callable[..., Any], Any, Any, Any]:
    """784-512-512-10, batch 256."""
    sizes = (784, 512, 512, 10)
    keys = jax.random.split(key, len(sizes))
    params = [
        jax.random.normal(k, (m, n)) / jnp.sqrt(m)
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    x = jax.random.normal(keys[-1], (256, 784))
    return model_fn, params, x, jnp.arange(256) % 10


def scanned(key: jax.Array) -> tuple[Callable[..., Any], Any, Any, Any]:
    """Twelve layers of width 256, stacked and scanned over, 8 sequences of 64 tokens."""
    keys = jax.random.split(key, 3)
    params = {
        "layers": jax.random.normal(keys[0], (12, 256, 256)) / 16,
        "out": jax.random.normal(keys[1], (256, 10)) / 16,
    }

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]

    return model_fn, params, jax.random.normal(keys[2], (8, 64, 256)), jnp.zeros((8, 64), int)


def programs(model_fn: Callable[..., Any], iterations: int) -> dict[str, Callable[..., Any]]:
    """Functions of (params, x, y): the gradient, and solves of zero and of many iterations."""

    def relinearising(params: Any, x: Any) -> Callable[[Any], Any]:
        model = lambda params: model_fn(params, x)

        def multiply(v: Any) -> Any:
            _, u = jax.jvp(model, (params,), (v,))
            z, pullback = jax.vjp(model, params)
            return pullback(HEAD.fisher(z, u) * (z.shape[-1] / z.size))[0]

        return multiply

    def solve(make: Callable[..., Any], steps: int) -> Callable[..., Any]:
        def program(params: Any, x: Any, y: Any) -> Any:
            del y
            return fvp.cg(make(params, x), params, damping=0.1, tol=0, maxiter=steps)[0]

        return program

    linearised = lambda params, x: fvp.fisher(model_fn, HEAD, params, x)
    return {
        "gradient": jax.grad(lambda params, x, y: HEAD.nll(model_fn(params, x), y).mean()),
        "fvp, no iteration": solve(linearised, 0),
        "fvp": solve(linearised, iterations),
        "re-linearising, no iteration": solve(relinearising, 0),
        "re-linearising": solve(relinearising, iterations),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--iterations", type=int, default=20, help="of conjugate gradients")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{'model':10}{'product':>16}{'CPU time':>10}   (in gradients)")
    for make in (mlp, scanned):
        model_fn, *data = make(jax.random.key(0))
        compiled = {
            name: jax.jit(program).lower(*data).compile()
            for name, program in programs(model_fn, arguments.iterations).items()
        }
        seconds = median_seconds(compiled, data, arguments.repeats, time.process_time)
        for name in ("fvp", "re-linearising"):
            loop = seconds[name] - seconds[f"{name}, no iteration"]
            cost = loop / arguments.iterations / seconds["gradient"]
            print(f"{make.__name__:10}{name:>16}{cost:>10.2f}")


if __name__ == "__main__":
    main()
