"""The (P, P) matrix of a curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator
from fvp.layers.captured_batch import CapturedBatch, capture_of
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import separated, shares_of
from fvp.layers.products import einsum
from fvp.mesh import row_axes
from fvp.numerics import zeros_of

if TYPE_CHECKING:
    from jaxtyping import Float


@compiled_when_eager
def dense_matrix(operator: CurvatureOperator) -> Float[Array, "P P"]:
    """The matrix in ``ravel_pytree`` order.

    A^T A, where the rows of A are the gradients of examples that layers give in one backward pass
    for each column of the root of H; by products with unit vectors where that is not to be had.
    """
    flat, unravel = ravel_pytree(zeros_of(operator.like))
    found = _captured(operator, flat.size)
    if found is None:
        column = lambda e: ravel_pytree(operator.mv(unravel(e)))[0]
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
    captured, signs = found

    def products(columns: Array) -> Array:
        rows = gradient_rows(captured, columns)
        signed = rows if signs is None else rows * signs.astype(rows.dtype)[:, None]
        rows, signed = (x.reshape(-1, flat.size) for x in (rows, signed))
        return einsum("np,nq->pq", rows, signed)

    size = max(1, CHUNK // max(1, captured.shares.size * flat.size))
    return captured.columns.sum(products, size).astype(flat.dtype)


def gradient_rows(captured: CapturedBatch, columns: Float[Array, "K ..."]) -> Float[Array, "K E P"]:
    """column_ke^T J for all columns k and examples e, where every use has a layer rule."""
    shapes = captured.layers.shapes
    front = columns.shape[0], captured.shares.size
    rows: list[Any] = [jnp.zeros((*front, *shape.shape), columns.dtype) for shape in shapes]
    for group in captured.gradients(columns):
        rows[group.leaf] += group.gradients()
    return jnp.concatenate([row.reshape(*front, -1) for row in rows], axis=2)


def _captured(
    operator: CurvatureOperator, size: int
) -> tuple[CapturedBatch, Float[Array, " E"] | None] | None:
    """The batch with the columns of the absolute weights, and the signs of the weights.

    None where as many backward passes would be taken as there are parameters, ``size``.
    """
    problem, root = operator.problem, operator.linearized.root()
    if problem is None or root is None or operator.axis_name is not None:
        return None
    if row_axes(operator.output) is not None:
        return None
    shares = shares_of(problem, operator.output)
    make = lambda separate: separated(root, jnp.abs(shares), separate, problem.head.event_ndim)
    captured = CapturedBatch.of(capture_of(problem), make)
    if captured.unmatched or captured.columns.number >= size:
        return None
    if problem.weights is None:
        return captured, None
    return None if captured.separate else (captured, jnp.sign(shares).ravel())
