"""Guarded factorisations of symmetric positive semi-definite matrices.

Rounding makes the smallest eigenvalues of a semi-definite matrix negative, and then Cholesky
returns NaN (at a damping of about 1e-12 in float64); an eigendecomposition does not. Matrices may
have batch axes in front. What is not finite never gets in: a factorisation of zeros comes out.
"""

from __future__ import annotations

import functools

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


def solve_semidefinite(matrix: Array, damping: Array, rhs: Array) -> Array:
    """(matrix + damping I)^-1 rhs for columns ``rhs``, by Cholesky, or eigh where that fails."""
    size = matrix.shape[-1]
    damping = jnp.asarray(damping, matrix.dtype)[..., None, None]
    factor = jnp.linalg.cholesky(matrix + damping * jnp.eye(size, dtype=matrix.dtype))
    by_cholesky = jax.scipy.linalg.cho_solve((factor, True), rhs)

    def by_eigenvalues() -> Array:
        values, vectors = eigh_semidefinite(matrix)
        # Below the rounding of the largest an eigenvalue is noise: nothing is divided by it.
        values = values[..., :, None] + damping
        floor = jnp.finfo(matrix.dtype).eps * size * jnp.max(values, axis=(-2, -1), keepdims=True)
        inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, values, 1), 0)
        projected = _einsum("...ji,...jk->...ik", vectors, rhs)
        return _einsum("...ij,...jk->...ik", vectors, inverse * projected)

    good = jnp.all(jnp.isfinite(by_cholesky))
    return jax.lax.cond(good, lambda: by_cholesky, by_eigenvalues)


def inverse_semidefinite(matrix: Array, damping: Array) -> Array:
    """(matrix + damping I)^-1, symmetric."""
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    inverse = solve_semidefinite(matrix, damping, identity)
    return 0.5 * (inverse + jnp.swapaxes(inverse, -2, -1))
