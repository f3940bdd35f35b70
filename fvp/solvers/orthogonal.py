"""Exact damped solves with the whitened Jacobian, by QR where its square loses digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.factorization import qr_above_damping
from fvp.layers.products import einsum
from fvp.numerics import cast_like, widen_tree, zeros_of
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSystem
from fvp.solvers.rounding import REFINEMENTS, above_noise, above_rounding_of_root
from fvp.typing import Params


class RowsOfRoot(Protocol):
    """A with F = A^T A; a row for each example and column of the root of H."""

    def rows(self) -> Array:
        """A, (N, P), with the parameters in ``ravel_pytree`` order."""
        ...

    def images(self, u: Array) -> Array:
        """A v where J v = ``u``, of N entries."""
        ...


def orthogonal_system(
    damped: DampedCurvature, rows: RowsOfRoot, coefficients: Array, norm: Array
) -> OrthogonalSystem:
    """(A^T A + damping I), factorised for gradients A^T w, w the ``coefficients``."""
    matrix = rows.rows()
    damped, total, least = above_rounding_of_root(damped, jnp.sum(jnp.square(matrix)), norm)
    kind = WideFactor if matrix.shape[0] < matrix.shape[1] else TallFactor
    factor = kind.of(matrix, total, least)
    return OrthogonalSystem(damped, rows, matrix, factor, total, coefficients.ravel(), least)


def root_triangle(
    square: Callable[[], Array], root: Callable[[], Array], damping: Array, least: Array | float
) -> Array:
    """The lower L of L L^T = R^T R + ``damping`` I for the ``root`` R.

    By Cholesky's factorisation of the ``square`` R^T R where damping is at least ``least`` and
    there is one, else by QR.
    """
    lower = _cholesky_above(square, damping, least)
    by_qr = lambda: qr_above_damping(root(), damping, mode="r").T
    return jax.lax.cond(jnp.all(jnp.isfinite(lower)), lambda: lower, by_qr)


def _cholesky_above(square: Callable[[], Array], damping: Array, least: Array | float) -> Array:
    """NaN where damping is below ``least`` or rounding left a negative pivot."""

    def factor() -> Array:
        matrix = square()
        shifted = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jnp.linalg.cholesky(shifted, symmetrize_input=False)

    shape = jax.eval_shape(square)
    missing = lambda: jnp.full(shape.shape, jnp.nan, shape.dtype)
    return jax.lax.cond(damping >= least, factor, missing)


def _solve(lower: Array, b: Array) -> Array:
    """(L L^T)^-1 b."""
    return jax.scipy.linalg.cho_solve((lower, True), b)


class WideFactor(NamedTuple):
    """Of min |A x - w|^2 + damping |x|^2 for a wide A."""

    matrix: Array  # A, (N, P)
    lower: Array  # L L^T = A A^T + damping I

    @classmethod
    def of(cls, matrix: Array, damping: Array, least: Array) -> WideFactor:
        """By the square of A with a ``damping`` of at least ``least``; else by QR."""
        square, root = lambda: _square(matrix.T), lambda: matrix.T
        return cls(matrix, root_triangle(square, root, damping, least))

    def solve(self, w: Array) -> Array:
        """The x for w."""
        return einsum("np,n->p", self.matrix, _solve(self.lower, w))

    def inverse(self, damping: Array) -> Callable[[Array], Array]:
        """A product with (A^T A + damping I)^-1."""
        lower = self.of(self.matrix, damping, jnp.zeros_like(damping)).lower

        def product(b: Array) -> Array:
            inner = _solve(lower, einsum("np,p->n", self.matrix, b))
            return (b - einsum("np,n->p", self.matrix, inner)) / damping

        return product


class TallFactor(NamedTuple):
    """Of min |A x - w|^2 + damping |x|^2 for a tall A."""

    matrix: Array  # A, (N, P)
    damping: Array
    lower: Array  # L L^T = A^T A + damping I
    orthogonal: Array  # the rows of Q beside those of A
    by_qr: Array  # bool scalar; else the rows are zeros

    @classmethod
    def of(cls, matrix: Array, damping: Array, least: Array) -> TallFactor:
        """By the square of A with a ``damping`` of at least ``least``; else by QR."""
        lower = _cholesky_above(lambda: _square(matrix), damping, least)
        missing = ~jnp.all(jnp.isfinite(lower))

        def by_qr() -> tuple[Array, Array]:
            orthogonal, triangle = qr_above_damping(matrix, damping)
            return triangle.T, orthogonal[: len(matrix)]

        by_square = lambda: (lower, jnp.zeros_like(matrix))
        lower, orthogonal = jax.lax.cond(missing, by_qr, by_square)
        return cls(matrix, damping, lower, orthogonal, missing)

    def solve(self, w: Array) -> Array:
        """The x for w."""

        def by_square() -> Array:
            def refine(_: Any, x: Array) -> Array:
                left = w - einsum("np,p->n", self.matrix, x)
                left = einsum("np,n->p", self.matrix, left) - self.damping * x
                return x + _solve(self.lower, left)

            return jax.lax.fori_loop(0, 1 + REFINEMENTS, refine, jnp.zeros_like(self.matrix[0]))

        def by_qr() -> Array:
            projected = einsum("np,n->p", self.orthogonal, w)
            return jax.scipy.linalg.solve_triangular(self.lower.T, projected)

        return jax.lax.cond(self.by_qr, by_qr, by_square)

    def inverse(self, damping: Array) -> Callable[[Array], Array]:
        """A product with (A^T A + damping I)^-1."""
        square, root = lambda: _square(self.matrix), lambda: self.matrix
        lower = root_triangle(square, root, damping, 0.0)
        return lambda b: _solve(lower, b)


def _square(matrix: Array) -> Array:
    return einsum("np,nq->pq", matrix, matrix)


@dataclasses.dataclass(frozen=True)
class OrthogonalSystem(DampedSystem):
    """The factorised A."""

    direct: ClassVar[bool] = True

    damped: DampedCurvature
    rows: RowsOfRoot
    matrix: Array  # A, (N, P)
    factor: WideFactor | TallFactor  # of A^T A + total I
    total: Array  # damping and l2
    coefficients: Array  # w, (N,)
    least: Array  # damping that A^T A wants

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """By the factor; ``start`` is not needed."""
        del start
        b, unravel = ravel_pytree(widen_tree(rhs))
        x = self.factor.solve(self.coefficients)
        rest = above_noise(b - einsum("np,n->p", self.matrix, self.coefficients), b)
        x += jax.lax.cond(jnp.any(rest != 0), self._solve_rest, jnp.zeros_like, rest)
        solution, operator = cast_like(unravel(x), rhs), self.damped.operator
        assert operator.problem is not None
        if operator.problem.weights is None:
            product = self._product(x)
        else:  # A leaves out what F has of negative ones
            product = ravel_pytree(widen_tree(operator.mv(solution)))[0]
        return solution, self.damped.record(x, b, product)

    def solve_outputs(self, u: Array) -> Params:
        """By the factor."""
        _, unravel = ravel_pytree(zeros_of(self.damped.operator.like))
        return unravel(self.factor.solve(self.rows.images(u).ravel()))

    def _product(self, x: Array) -> Array:
        return einsum("np,n->p", self.matrix, einsum("np,p->n", self.matrix, x))

    def _solve_rest(self, rest: Array) -> Array:
        """Of what may hold rounding outside the range of F, which less damping would blow up."""
        damping = jnp.maximum(self.total, self.least)
        inverse = self.factor.inverse(damping)
        x = inverse(rest)
        return x + inverse(rest - self._product(x) - damping * x)
