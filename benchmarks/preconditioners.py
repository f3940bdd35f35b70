"""CG iterations to a relative residual of 1e-3, with and without preconditioners.

    python benchmarks/preconditioners.py

- scales: least squares with 200 features whose sizes are spread from 0.01 to 30, random right-hand
  side: what the diagonal is for.
- kernel: least squares with 500 random cosines of two inputs (a Gaussian kernel), whose eigenvalues
  fall exponentially: what Nystrom is for.
- network: the Fisher of a trained 64-128-10 network on scikit-learn's digits.
- Laplacian: second differences on 1,000 points; neither a low rank nor the diagonal can help.

The damping is 1e-4, Nystrom's rank 50; "exact" is the inverse by eigenvalues, up to
1,000 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tasks import TASKS

import fvp

DAMPING, RANK = 1e-4, 50


def least_squares(features: jax.Array, rhs: jax.Array) -> tuple[Any, Any, Any]:
    """Operator, right-hand side and diagonal."""
    model_fn, head, w = lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((features.shape[1], 1))
    operator = fvp.fisher(model_fn, head, w, features)
    return operator, rhs[:, None], fvp.fisher_diagonal(model_fn, head, w, features)


def scales() -> tuple[Any, Any, Any]:
    """Features of many sizes."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = 10 ** jax.random.uniform(keys[0], (200,), minval=-2, maxval=1.5)
    features = sizes * jax.random.normal(keys[1], (1000, 200))
    return least_squares(features, jax.random.normal(keys[2], (200,)))


def kernel() -> tuple[Any, Any, Any]:
    """Random cosines, fitted to a function."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (1000, 2))
    waves, shift = jax.random.normal(keys[1], (2, 500)), jax.random.uniform(keys[2], (500,))
    features = jnp.cos(3 * x @ waves + 2 * jnp.pi * shift)
    return least_squares(features, features.T @ jnp.sin(5 * x[:, 0] * x[:, 1]) / len(x))


def network() -> tuple[Any, Any, Any]:
    """A network after five natural-gradient steps."""
    task, head = TASKS["digits"](), fvp.Softmax()
    params, x, y = jax.tree.map(jnp.asarray, (task.init(0), task.inputs, task.targets))
    tx = fvp.natural_gradient(1.0, task.model_fn, head)
    state = tx.init(params)
    for _ in range(5):
        _, gradient = fvp.fisher(task.model_fn, head, params, x).value_and_grad(y)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        params = jax.tree.map(jnp.add, params, updates)
    operator = fvp.fisher(task.model_fn, head, params, x)
    diagonal = fvp.fisher_diagonal(task.model_fn, head, params, x)
    return operator, operator.value_and_grad(y)[1], diagonal


def laplacian() -> tuple[Any, Any, Any]:
    """Second differences, and a random right-hand side."""
    pad = lambda v: jnp.pad(v, 1)
    multiply = lambda v: 2 * v - pad(v)[2:] - pad(v)[:-2]
    rhs = jax.random.normal(jax.random.key(1), (1000,))
    return multiply, rhs, jnp.full(1000, 2.0)


def exact_inverse(operator: Any, rhs: Any) -> Callable[[Any], Any]:
    """(A + damping I)^-1 by eigenvalues, in float64."""
    flat, unravel = ravel_pytree(rhs)
    multiply = getattr(operator, "mv", operator)
    matrix = jax.lax.map(lambda e: ravel_pytree(multiply(unravel(e)))[0], jnp.eye(flat.size))
    values, vectors = np.linalg.eigh(np.asarray(matrix, float))
    inverse = (vectors / (np.maximum(values, 0) + DAMPING)) @ vectors.T
    return lambda r: unravel(jnp.asarray(inverse, jnp.float32) @ ravel_pytree(r)[0])


def main() -> None:
    """Prints a line for each problem."""
    print(f"{'problem':12}{'plain':>8}{'diagonal':>10}{'Nystrom':>9}{'exact':>7}   (iterations)")
    for make in (scales, kernel, network, laplacian):
        operator, rhs, diagonal = make()
        key = jax.random.key(0)
        preconditioners: list[Any] = [
            None,
            fvp.diagonal_preconditioner(diagonal, DAMPING, exponent=1.0),
            fvp.nystrom_preconditioner(operator, rhs, DAMPING, key, rank=RANK),
        ]
        if sum(map(jnp.size, jax.tree.leaves(rhs))) <= 1000:
            preconditioners.append(exact_inverse(operator, rhs))
        counts = [
            int(fvp.cg(operator, rhs, damping=DAMPING, tol=1e-3, M=M)[1].iterations)
            for M in preconditioners
        ]
        cells = zip(counts, (8, 10, 9, 7), strict=False)
        print(f"{make.__name__:12}" + "".join(f"{count:>{width}}" for count, width in cells))


if __name__ == "__main__":
    main()
