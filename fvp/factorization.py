"""Guarded factorisations of symmetric positive semi-definite matrices.

Rounding makes the smallest eigenvalues of a semi-definite matrix negative, and then Cholesky
returns NaN (at a damping of about 1e-12 in float64); an eigendecomposition does not. Matrices may
have batch axes in front. What is not finite never gets in: a factorisation of zeros comes out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def eigh_semidefinite(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, clipped to 0 or more, and eigenvectors of a semi-definite ``matrix``."""
    finite = jnp.all(jnp.isfinite(matrix))
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, jnp.zeros_like(matrix)))
    usable = jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(vectors))
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), vectors.shape)
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    values = jnp.where(usable, values, jnp.where(finite, diagonal, 0))
    return jnp.maximum(values, 0), jnp.where(usable, vectors, identity)


class SemidefiniteFactor(NamedTuple):
    """Of matrix + damping I: its Cholesky factor, or eigenvalues and vectors where that failed."""

    cholesky: Array
    values: Array
    vectors: Array
    by_cholesky: Array  # bool scalar

    @classmethod
    def of(cls, matrix: Array, damping: Array) -> SemidefiniteFactor:
        """Factorises once, for any number of solves."""
        damping = jnp.asarray(damping, matrix.dtype)[..., None]
        shifted = matrix + damping[..., None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
        # LAPACK reads columns: of the transpose, the same matrix, products in rows need no copies.
        columns = jnp.swapaxes(shifted, -2, -1)
        cholesky = jnp.linalg.cholesky(columns, symmetrize_input=False)
        good = jnp.all(jnp.isfinite(cholesky))

        def eigenvalues() -> tuple[Array, Array]:
            values, vectors = eigh_semidefinite(matrix)
            return values + damping, vectors

        unused = lambda: (jnp.zeros_like(matrix[..., 0]), jnp.zeros_like(matrix))
        values, vectors = jax.lax.cond(good, unused, eigenvalues)
        return cls(cholesky, values, vectors, good)

    @classmethod
    def of_triangle(cls, triangle: Array) -> SemidefiniteFactor:
        """Of R^T R for the upper triangular R."""
        unused = jnp.zeros_like(triangle)
        return cls(triangle.T, unused[0], unused, jnp.array(True))

    def solve(self, rhs: Array) -> Array:
        """(matrix + damping I)^-1 rhs for columns ``rhs``."""
        by_cholesky = jax.scipy.linalg.cho_solve((self.cholesky, True), rhs)

        def by_eigenvalues() -> Array:
            # Below the rounding of the largest an eigenvalue is noise: nothing is divided by it.
            values, size = self.values[..., None], self.values.shape[-1]
            largest = jnp.max(values, axis=(-2, -1), keepdims=True)
            floor = jnp.finfo(values.dtype).eps * size * largest
            inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, values, 1), 0)
            projected = _einsum("...ji,...jk->...ik", self.vectors, rhs)
            return _einsum("...ij,...jk->...ik", self.vectors, inverse * projected)

        return jax.lax.cond(self.by_cholesky, lambda: by_cholesky, by_eigenvalues)


def qr_above_damping(root: Array, damping: Array, *, mode: str = "reduced") -> Any:
    """The QR factorisation of ``root`` (N, n) above sqrt(damping) I, with all N + n rows."""
    shift = jnp.sqrt(damping.astype(root.dtype)) * jnp.eye(root.shape[1], dtype=root.dtype)
    return jnp.linalg.qr(jnp.concatenate([root, shift]), mode=mode)


def inverse_semidefinite(matrix: Array, damping: Array) -> Array:
    """(matrix + damping I)^-1, symmetric, with more damping where Cholesky wants it.

    A damping of eps n times the largest entry is what rounding needs, for (n, n) matrices.
    """
    size, dtype = matrix.shape[-1], matrix.dtype
    identity = jnp.eye(size, dtype=dtype)
    finite = jnp.all(jnp.isfinite(matrix))
    matrix = jnp.where(finite, matrix, jnp.zeros_like(matrix))
    shifted = matrix + jnp.asarray(damping, dtype)[..., None, None] * identity
    largest = jnp.max(jnp.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    more = jnp.where(largest > 0, jnp.finfo(dtype).eps * size * largest, 1)
    root = jnp.linalg.cholesky(shifted)
    root = jax.lax.cond(
        jnp.all(jnp.isfinite(root)),
        lambda: root,
        lambda: jnp.linalg.cholesky(shifted + more * identity),
    )
    inverse = _self_product(_inverse_lower(root))
    return 0.5 * (inverse + jnp.swapaxes(inverse, -2, -1))


# A triangular solve with the identity takes several times as long as products of halves.
_WHOLE = 300  # rows that are not halved; docs/decisions/solvers.md


def _inverse_lower(root: Array) -> Array:
    """The inverse of a lower triangular matrix."""
    size = root.shape[-1]
    if size <= _WHOLE:
        identity = jnp.broadcast_to(jnp.eye(size, dtype=root.dtype), root.shape)
        return jax.scipy.linalg.solve_triangular(root, identity, lower=True)
    half = size // 2
    first, last = _inverse_lower(root[..., :half, :half]), _inverse_lower(root[..., half:, half:])
    side = -_einsum("...ij,...jk,...kl->...il", last, root[..., half:, :half], first)
    zeros = jnp.zeros_like(jnp.swapaxes(side, -2, -1))
    return jnp.block([[first, zeros], [side, last]])


def _self_product(lower: Array) -> Array:
    """N^T N of a lower triangular N."""
    size = lower.shape[-1]
    if size <= _WHOLE:
        return _einsum("...ki,...kj->...ij", lower, lower)
    half = size // 2
    side, last = lower[..., half:, :half], lower[..., half:, half:]
    first = _self_product(lower[..., :half, :half]) + _einsum("...ki,...kj->...ij", side, side)
    corner = _einsum("...ki,...kj->...ij", last, side)
    return jnp.block([[first, jnp.swapaxes(corner, -2, -1)], [corner, _self_product(last)]])
