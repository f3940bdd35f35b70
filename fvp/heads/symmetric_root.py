"""Products with small matrices of each example, and their symmetric roots."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def symmetric_root(matrix: Array) -> Array:
    """The symmetric S with S S = ``matrix``, which is positive semi-definite up to rounding."""
    values, vectors = jnp.linalg.eigh(matrix)
    return multiply("ij,kj->ik", vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors)
