"""Sums over a first axis, a few entries at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import scan_sum
from fvp.typing import PyTree

# docs/decisions/layers.md
CHUNK = 2**25  # entries of per-example gradients, or of cotangents, that are held at a time


def sum_in_chunks(function: Callable[[PyTree], PyTree], data: PyTree, size: int) -> PyTree:
    """The sum of ``function`` over chunks of ``size`` entries of the first axis of ``data``.

    The last is padded with zeros, for which ``function`` must be zero.
    """
    count = jax.tree.leaves(data)[0].shape[0]
    if size >= count:
        return function(data)
    padding = -count % size

    def split(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
        return x.reshape(-1, size, *x.shape[1:])

    return scan_sum(function, jax.tree.map(split, data))
