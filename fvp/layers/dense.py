"""The (P, P) matrix of a curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator
from fvp.layers.captured_batch import CapturedBatch, captured_rows
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import less_mean, separated, shares_of
from fvp.layers.products import einsum
from fvp.mesh import row_axes
from fvp.numerics import widen, zeros_of

if TYPE_CHECKING:
    from jaxtyping import Float


@compiled_when_eager
def dense_matrix(operator: CurvatureOperator) -> Float[Array, "P P"]:
    """The matrix in ``ravel_pytree`` order.

    A^T A, where A has a row for each example and column of the root of H: by layers, in one
    backward pass for each column; where rows meet, or layers are not matched, in one JVP for each
    parameter. By products with unit vectors where neither is to be had.
    """
    flat, unravel = ravel_pytree(zeros_of(operator.like))
    unit_vectors = jnp.eye(flat.size, dtype=flat.dtype)
    problem, z = operator.problem, operator.linearized.output
    root, jacobian = operator.linearized.root(), operator.linearized.jacobian
    split = operator.axis_name is not None or row_axes(z) is not None
    if problem is None or root is None or jacobian is None or split:
        return _by_products(operator, unit_vectors, unravel)
    event_ndim, shares = problem.head.event_ndim, shares_of(problem, z)
    make = lambda separate: separated(root, jnp.abs(shares), separate, event_ndim)
    captured, centered = captured_rows(problem, make)
    if not captured.unmatched and not captured.separate:
        centre = (lambda rows: less_mean(rows, shares, 1)) if centered else (lambda rows: rows)
        rows_of = lambda columns: centre(gradient_rows(captured, columns))
    elif flat.size * z.size <= CHUNK:
        images = jax.vmap(lambda e: jacobian.jvp(unravel(e)))(unit_vectors)
        images = widen(images).reshape(flat.size, shares.size, -1)
        rows_of = lambda columns: einsum(
            "pei,kei->kep", images, columns.reshape(-1, *images.shape[1:])
        )
    else:
        return _by_products(operator, unit_vectors, unravel)

    def products(columns: Array) -> Array:
        rows = signed = rows_of(columns)
        if problem.weights is not None:
            signed = rows * jnp.sign(shares).reshape(-1, 1).astype(rows.dtype)
        rows, signed = (x.reshape(-1, flat.size) for x in (rows, signed))
        return einsum("np,nq->pq", rows, signed)

    size = max(1, CHUNK // max(1, shares.size * flat.size))
    return make(()).sum(products, size).astype(flat.dtype)


def gradient_rows(captured: CapturedBatch, columns: Float[Array, "K ..."]) -> Float[Array, "K E P"]:
    """column_ke^T J for all columns k and examples e, where every use has a layer rule."""
    shapes = captured.layers.shapes
    front = columns.shape[0], captured.shares.size
    rows: list[Any] = [jnp.zeros((*front, *shape.shape), columns.dtype) for shape in shapes]
    for group in captured.gradients(columns):
        rows[group.leaf] += group.gradients()
    return jnp.concatenate([row.reshape(*front, -1) for row in rows], axis=2)


def _by_products(operator: CurvatureOperator, unit_vectors: Array, unravel: Any) -> Array:
    column = lambda e: ravel_pytree(operator.mv(unravel(e)))[0]
    return jax.vmap(column, out_axes=1)(unit_vectors)
