"""What a whole training step with ten CG iterations costs, in gradients, beside somax.

    pip install python-somax && python benchmarks/step.py

784-512-512-10, batch 256. fvp's steps have gradient, ten iterations, the trial of the step on the
loss, and the damping's update; "plain" is without momentum, whose start costs one more product.
somax's have gradient, ten iterations, and with its trust region the same trial. Times are CPU time
of the process (all threads), medians of interleaved repeats; flops are of the traced program:
loops as often as they run, of a condition the dearer branch. Without somax its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from _measure import median_seconds
from costs import matmul_flops
from products import HEAD, mlp

import fvp

ITERATIONS = 10


def natural_gradient(model_fn: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """``init`` and ``step`` of fvp's transformation."""
    tx = fvp.natural_gradient(1.0, model_fn, HEAD, maxiter=ITERATIONS, tol=0, **options)

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        operator = fvp.fisher(model_fn, HEAD, params, x)
        value, gradient = operator.value_and_grad(y)
        data = {"operator": operator, "batch": x, "targets": y}
        updates, state = tx.update(gradient, state, params, **data)
        return optax.apply_updates(params, updates), state, value

    return tx.init, step


def somax(model_fn: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """``init`` and ``step`` of somax's Gauss-Newton method."""
    method = importlib.import_module("somax").sgn_ce(
        predict_fn=model_fn, maxiter=ITERATIONS, tol=0.0, lam0=0.1, warm_start=False, **options
    )

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        return method.step(params, {"x": x, "y": y}, state, jax.random.key(0))

    return method.init, step


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    model_fn, params, x, y = mlp(jax.random.key(0))
    methods = {
        "fvp": natural_gradient(model_fn),
        "fvp, plain": natural_gradient(model_fn, momentum=0.0),
    }
    if importlib.util.find_spec("somax"):
        methods["somax"] = somax(model_fn)
        methods["somax, trust region"] = somax(model_fn, lam_policy="trust_region")
    else:
        print("somax is not installed")

    gradient = jax.grad(lambda params, x, y: HEAD.nll(model_fn(params, x), y).mean())
    programs: dict[str, Callable[..., Any]] = {
        "gradient": lambda params, states, x, y: gradient(params, x, y)
    }
    for name, (_, step) in methods.items():
        programs[name] = lambda params, states, x, y, name=name, step=step: step(
            params, states[name], x, y
        )
    # The second step: the first one alone measures the curvature that damping starts from.
    states = {
        name: jax.jit(step)(params, init(params), x, y)[1] for name, (init, step) in methods.items()
    }
    data = params, states, x, y
    compiled = {name: jax.jit(program).lower(*data).compile() for name, program in programs.items()}
    seconds = median_seconds(compiled, data, arguments.repeats, time.process_time)
    flops = {
        name: matmul_flops(jax.make_jaxpr(program)(*data).jaxpr, ITERATIONS)
        for name, program in programs.items()
    }
    print(f"{'step':22}{'CPU time':>10}{'flops':>8}   (in gradients)")
    for name in methods:
        cpu, work = (float(cost[name] / cost["gradient"]) for cost in (seconds, flops))
        print(f"{name:22}{cpu:>10.1f}{work:>8.1f}")


if __name__ == "__main__":
    main()
