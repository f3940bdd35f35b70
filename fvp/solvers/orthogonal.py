"""Exact damped solves with the whitened Jacobian, by QR where its square loses digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.factorization import SemidefiniteFactor, qr_above_damping
from fvp.layers.dense import MOST_ENTRIES, WhitenedRows
from fvp.layers.products import einsum
from fvp.numerics import cast_like, widen_tree, zeros_of
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSystem
from fvp.solvers.rounding import REFINEMENTS, above_noise, above_rounding_of_root
from fvp.typing import Params


def orthogonal_system(damped: DampedCurvature, targets: Any, norm: Array) -> DampedSystem | None:
    """(A^T A + damping I), factorised for gradients of the loss at ``targets``, of this ``norm``.

    None where A is not to be had, or too large, or does not tell that gradient.
    """
    rows = WhitenedRows.of(damped.operator)
    w = None if rows is None else rows.coefficients(targets)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(damped.operator.like))
    if rows is None or w is None or w.size * parameters > MOST_ENTRIES:
        return None
    matrix = rows.matrix()
    damped, total, least = above_rounding_of_root(damped, jnp.sum(jnp.square(matrix)), norm)
    if w.size < parameters:
        gram = einsum("np,mp->nm", matrix, matrix)
        factor = dual_factor(gram, lambda: matrix.T, total, least)
        solve = lambda w: einsum("np,n->p", matrix, factor.solve(w[:, None])[:, 0])
    else:
        solve = LeastSquaresFactor.of(matrix, total, least).solve
    return OrthogonalSystem(damped, rows, matrix, solve, total, w, least)


def dual_factor(
    gram: Array, root: Callable[[], Array], total: Array, least: Array
) -> SemidefiniteFactor:
    """Of root^T root + ``total`` I: of the ``gram`` matrix, where that is at least ``least``."""
    by_square = lambda: SemidefiniteFactor.of(gram, total)
    return jax.lax.cond(
        total >= least, by_square, lambda: SemidefiniteFactor.of_root(root(), total)
    )


class LeastSquaresFactor(NamedTuple):
    """Of min |A x - w|^2 + damping |x|^2 for a tall A."""

    matrix: Array  # A, (N, P)
    damping: Array
    square: SemidefiniteFactor  # of A^T A + damping I
    orthogonal: Array  # the rows of Q beside those of A
    by_qr: Array  # bool scalar; else the rows are zeros

    @classmethod
    def of(cls, matrix: Array, damping: Array, least: Array) -> LeastSquaresFactor:
        """By the square of A with a ``damping`` of at least ``least``; else by QR."""

        def by_square() -> tuple[SemidefiniteFactor, Array]:
            square = einsum("np,nq->pq", matrix, matrix)
            return SemidefiniteFactor.of(square, damping), jnp.zeros_like(matrix)

        def by_qr() -> tuple[SemidefiniteFactor, Array]:
            orthogonal, triangle = qr_above_damping(matrix, damping)
            return SemidefiniteFactor.of_triangle(triangle), orthogonal[: len(matrix)]

        below = damping < least
        square, orthogonal = jax.lax.cond(below, by_qr, by_square)
        return cls(matrix, damping, square, orthogonal, below)

    def solve(self, w: Array) -> Array:
        """The x for w."""

        def by_square() -> Array:
            def refine(_: Any, x: Array) -> Array:
                left = w - einsum("np,p->n", self.matrix, x)
                left = einsum("np,n->p", self.matrix, left) - self.damping * x
                return x + self.square.solve(left[:, None])[:, 0]

            return jax.lax.fori_loop(0, 1 + REFINEMENTS, refine, jnp.zeros_like(self.matrix[0]))

        def by_qr() -> Array:
            projected = einsum("np,n->p", self.orthogonal, w)
            return jax.scipy.linalg.solve_triangular(self.square.cholesky.T, projected)

        return jax.lax.cond(self.by_qr, by_qr, by_square)


@dataclasses.dataclass(frozen=True)
class OrthogonalSystem(DampedSystem):
    """The factorised A."""

    direct: ClassVar[bool] = True

    damped: DampedCurvature
    rows: WhitenedRows
    matrix: Array  # A, (N, P)
    solve_rows: Callable[[Array], Array]  # w -> (A^T A + total I)^-1 A^T w
    total: Array  # damping and l2
    coefficients: Array  # w, (N,)
    least: Array  # damping that A^T A wants

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """By the factor; ``start`` is not needed."""
        del start
        b, unravel = ravel_pytree(widen_tree(rhs))
        x = self.solve_rows(self.coefficients)
        rest = above_noise(b - einsum("np,n->p", self.matrix, self.coefficients), b)
        x += jax.lax.cond(jnp.any(rest != 0), self._solve_rest, jnp.zeros_like, rest)
        x = cast_like(unravel(x), rhs)
        return x, self.damped.record(x, rhs)

    def solve_outputs(self, u: Array) -> Params:
        """By the factor."""
        _, unravel = ravel_pytree(zeros_of(self.damped.operator.like))
        return unravel(self.solve_rows(self.rows.images(u)))

    def _solve_rest(self, rest: Array) -> Array:
        """Of what may hold rounding outside the range of F, which less damping would blow up."""
        damping = jnp.maximum(self.total, self.least)
        factor = SemidefiniteFactor.of(einsum("np,nq->pq", self.matrix, self.matrix), damping)
        solve = lambda b: factor.solve(b[:, None])[:, 0]
        x = solve(rest)
        product = einsum("np,n->p", self.matrix, einsum("np,p->n", self.matrix, x))
        return x + solve(rest - product - damping * x)
