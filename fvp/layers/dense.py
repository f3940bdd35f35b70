"""The (P, P) matrix of a curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator
from fvp.heads import Root
from fvp.layers.captured_batch import CapturedBatch, captured_rows
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import Columns, less_mean, score_coefficients, separated, shares_of
from fvp.layers.products import einsum
from fvp.mesh import row_axes
from fvp.numerics import widen, zeros_of

if TYPE_CHECKING:
    from jaxtyping import Float

MOST_ENTRIES = 2**27  # of a Jacobian as a matrix: a GiB in float64; docs/decisions/solvers.md


@compiled_when_eager
def dense_matrix(operator: CurvatureOperator) -> Float[Array, "P P"]:
    """The matrix in ``ravel_pytree`` order: A^T A, or by products with unit vectors."""
    flat, unravel = ravel_pytree(zeros_of(operator.like))
    jacobian = WhitenedRows.of(operator)
    if jacobian is None:
        column = lambda e: ravel_pytree(operator.mv(unravel(e)))[0]
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
    columns, weights = jacobian.columns, operator.problem and operator.problem.weights

    def products(these: Array) -> Array:
        rows = signed = jacobian.make(these)
        if weights is not None:
            signed = rows * jnp.sign(jacobian.shares).reshape(-1, 1).astype(rows.dtype)
        rows, signed = (x.reshape(-1, flat.size) for x in (rows, signed))
        return einsum("np,nq->pq", rows, signed)

    size = max(1, CHUNK // max(1, columns.shares.size * flat.size))
    return columns.sum(products, size).astype(flat.dtype)


@dataclasses.dataclass(frozen=True)
class WhitenedRows:
    """A with F = A^T A as rows of numbers; lives inside one trace.

    Attributes:
      shares: w_i / sum w of the examples.
      root: that of H.
      columns: its K columns, weighted by the roots of abs(shares).
      make: such columns (K, like z) -> rows (K, E, P) in ``ravel_pytree`` order.
    """

    shares: Array
    root: Root
    columns: Columns
    make: Callable[[Array], Array]

    @classmethod
    def of(cls, operator: CurvatureOperator) -> WhitenedRows | None:
        """The rows of ``operator``, or None where they are not to be had.

        By layers, in one backward pass for each column; where rows meet, or layers are not matched,
        in one JVP for each parameter.
        """
        problem, z = operator.problem, operator.linearized.output
        root, jacobian = operator.linearized.root(), operator.linearized.jacobian
        split = operator.axis_name is not None or row_axes(z) is not None
        if problem is None or root is None or jacobian is None or split:
            return None
        shares = shares_of(problem, z)
        make = lambda separate: separated(root, jnp.abs(shares), separate, problem.head.event_ndim)
        captured, centered = captured_rows(problem, make)
        if not captured.unmatched and not captured.separate:
            centre = (lambda rows: less_mean(rows, shares, 1)) if centered else (lambda rows: rows)
            by_layers = lambda columns: centre(gradient_rows(captured, columns))
            return cls(shares, root, make(()), by_layers)
        flat, unravel = ravel_pytree(zeros_of(operator.like))
        if flat.size * z.size > CHUNK:
            return None
        units = jnp.eye(flat.size, dtype=flat.dtype)
        images = widen(jax.vmap(lambda e: jacobian.jvp(unravel(e)))(units))
        images = images.reshape(flat.size, shares.size, -1)
        by_images = lambda columns: einsum(
            "pei,kei->kep", images, columns.reshape(-1, *images.shape[1:])
        )
        return cls(shares, root, make(()), by_images)

    def rows(self) -> Float[Array, "N P"]:
        """All rows, N = K E; zeros for examples of negative weight."""
        rows = self.make(self.columns.all())
        rows = jnp.where(self.shares.reshape(-1, 1) < 0, 0, rows)
        return rows.reshape(-1, rows.shape[-1])

    def images(self, u: Array) -> Float[Array, " N"]:
        """A v where J v = ``u``."""
        columns = self.columns.all().reshape(self.columns.number, self.shares.size, -1)
        return jnp.sum(columns * widen(u).reshape(self.shares.size, -1), axis=-1).ravel()

    def coefficients(self, targets: Any) -> Float[Array, " N"] | None:
        """The w with A^T w = the gradient of the loss at ``targets``; None where not known."""
        found = score_coefficients(self.root, jnp.abs(self.shares), targets)
        return None if found is None else found.reshape(self.shares.size, -1).T.ravel()


def gradient_rows(captured: CapturedBatch, columns: Float[Array, "K ..."]) -> Float[Array, "K E P"]:
    """column_ke^T J for all columns k and examples e, where every use has a layer rule."""
    shapes = captured.layers.shapes
    front = columns.shape[0], captured.shares.size
    rows: list[Any] = [jnp.zeros((*front, *shape.shape), columns.dtype) for shape in shapes]
    for group in captured.gradients(columns):
        rows[group.leaf] += group.gradients()
    return jnp.concatenate([row.reshape(*front, -1) for row in rows], axis=2)
