"""Nonlinear least squares of CUTEst, NIST's among them, beside optimistix' Levenberg-Marquardt.

    pip install -e ".[benchmarks]" sif2jax optimistix
    python benchmarks/least_squares.py
    python benchmarks/least_squares.py --names MISRA1A THURBER --steps 100

The systems of equations of sif2jax without bounds are taken as sums of squares, in float64, from
their own starts. fvp goes with nothing set but the line for exact steps. A problem is solved where
a sum of squares is within a millionth of the lower one of both, or 1e-14 of its start; steps count
until then, also those that were rejected. Prints what one solves and the other does not; writes
`out/least_squares.json` as it goes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import fvp

HEAD = fvp.Gaussian(event_ndim=0)


def by_fvp(residuals: Callable[[Array], Array], start: Array, steps: int) -> np.ndarray:
    """Sums of squares after each step."""
    model_fn, batch = lambda y, _: residuals(y), jnp.zeros(1)
    targets = jnp.zeros_like(residuals(start))
    tx = fvp.natural_gradient(
        1.0, model_fn, HEAD, solver="dense", line_search="loss", geodesic=True
    )

    def step(carry: Any, _: None) -> Any:
        y, state = carry
        operator = fvp.fisher(model_fn, HEAD, y, batch)
        gradient = operator.value_and_grad(targets)[1]
        data = {"operator": operator, "batch": batch, "targets": targets}
        updates, state = tx.update(gradient, state, y, **data)
        y = jnp.asarray(optax.apply_updates(y, updates))
        return (y, state), jnp.sum(residuals(y) ** 2)

    run = jax.jit(lambda y: jax.lax.scan(step, (y, tx.init(y)), length=steps)[1])
    return np.asarray(run(start))


def by_optimistix(residuals: Callable[[Array], Array], start: Array, steps: int) -> np.ndarray:
    """The same, until it stops."""
    optimistix, equinox = import_module("optimistix"), import_module("equinox")
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    fn, tags = lambda y, args: (residuals(y), None), frozenset()
    state = solver.init(fn, start, None, {}, jax.eval_shape(residuals, start), None, tags)

    @equinox.filter_jit
    def step(y: Array, state: Any) -> Any:
        y, state, _ = solver.step(fn, y, None, {}, state, tags)
        return y, state, jnp.sum(residuals(y) ** 2), solver.terminate(fn, y, None, {}, state, tags)

    y, sums = start, []
    for _ in range(steps):
        y, state, value, (stopped, _) = step(y, state)
        sums.append(float(value))
        if stopped:
            break
    return np.asarray(sums)


METHODS = {"fvp": by_fvp, "optimistix": by_optimistix}


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable, Array]]:
    """Names, residuals and starts of those that are small enough."""
    for problem in import_module("sif2jax").nonlinear_equations_problems:
        if arguments.names and problem.name not in arguments.names:
            continue
        start, unravel = ravel_pytree(jax.tree.map(jnp.asarray, problem.y0))
        if problem.bounds is not None or start.size > arguments.most_parameters:
            continue

        def residuals(y: Any, problem: Any = problem, unravel: Any = unravel) -> Array:
            return ravel_pytree(problem.constraint(unravel(y))[0])[0]

        yield problem.name, residuals, start.astype(float)


def measure(residuals: Callable[[Array], Array], start: Array, steps: int) -> dict[str, Any]:
    """Of each method the sum of squares at the end, and the steps until it was solved, or None."""
    finite = lambda sums: np.where(np.isfinite(sums), sums, np.inf)
    sums = {name: finite(method(residuals, start, steps)) for name, method in METHODS.items()}
    first, lowest = float(jnp.sum(residuals(start) ** 2)), min(s.min() for s in sums.values())
    solved = (1 + 1e-6) * lowest + 1e-14 * first
    count = lambda s: int(np.argmax(s <= solved)) + 1 if (s <= solved).any() else None
    return {name: {"end": float(s[-1]), "steps": count(s)} for name, s in sums.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--names", nargs="*", help="of sif2jax; all where none is given")
    parser.add_argument("--most-parameters", type=int, default=30)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("out/least_squares.json"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, residuals, start in (bar := tqdm(list(problems(arguments)), unit="problem")):
        bar.set_description(name)
        row = rows[name] = measure(residuals, start, arguments.steps)
        arguments.output.write_text(json.dumps(rows, indent=1))
        if (row["fvp"]["steps"] is None) != (row["optimistix"]["steps"] is None):
            tqdm.write(f"{name}: {row}")
        jax.clear_caches()
    both = [row for row in rows.values() if all(row[method]["steps"] for method in METHODS)]
    print(f"| of {len(rows)} problems | solved | median steps where both solve |")
    print("|---|---|---|")
    for method in METHODS:
        solved = sum(row[method]["steps"] is not None for row in rows.values())
        print(f"| {method} | {solved} | {np.median([row[method]['steps'] for row in both]):.0f} |")


if __name__ == "__main__":
    main()
