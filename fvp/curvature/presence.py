"""Inputs of examples that have no weight.

Masking outputs is not enough: where an input is NaN or infinite so is the Jacobian, and a cotangent
of zero times it is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import broadcast_weights
from fvp.heads import Head
from fvp.typing import Batch


def without_absent(
    head: Head,
    batch: Batch,
    axes: Sequence[int | None] | None,
    weights: Any,
    outputs: Callable[[], Any],
) -> Batch:
    """``batch`` with the inputs of weight zero that are not finite replaced by those of an example.

    Only by ``weights``, and only in floating-point leaves whose example axis (``axes``; the first
    where that is None) is as long as that of the model's output, whose shape ``outputs()`` tells. A
    leaf that begins with all batch axes of the output is read position by position, any other
    example by example. Finite inputs stay as they are: a leaf may have that length by chance, and
    where examples meet in the model (message passing, batch normalisation) theirs count.
    """
    leaves, structure = jax.tree.flatten(batch)
    axes = [0] * len(leaves) if axes is None else axes
    pairs = list(zip(leaves, axes, strict=True))
    if not any(_may_hold(leaf, axis) for leaf, axis in pairs):
        return batch
    z = outputs()
    head.check_outputs(z)
    counts = head.batch_shape(z)
    present = broadcast_weights(weights, counts, jnp.float32) != 0

    def finite(leaf: Any, axis: int | None) -> Any:
        if axis is None or not _may_hold(leaf, axis) or jnp.shape(leaf)[axis] != counts[0]:
            return leaf
        return _finite_rows(jnp.asarray(leaf), axis, present)

    return jax.tree.unflatten(structure, [finite(leaf, axis) for leaf, axis in pairs])


def _may_hold(leaf: Any, axis: int | None) -> bool:
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return floating and axis is not None and -jnp.ndim(leaf) <= axis < jnp.ndim(leaf)


def _finite_rows(leaf: Array, axis: int, present: Array) -> Array:
    """The rows of ``leaf`` without weight, if they are not finite, as the first row with weight."""
    rows = [axis]
    if axis == 0 and leaf.shape[: present.ndim] == present.shape:
        rows = list(range(present.ndim))
    else:
        present = jnp.any(present, axis=tuple(range(1, present.ndim)))
    entries = [d for d in range(leaf.ndim) if d not in rows]
    finite = jnp.all(jnp.isfinite(leaf), axis=entries, keepdims=True)
    present = jnp.expand_dims(present, entries)
    # By reductions: a row of a sharded axis can't be indexed.
    order = _positions(leaf, rows)
    first = order == jnp.min(jnp.where(present, order, present.size), keepdims=True)
    substitute = jnp.sum(jnp.where(first, leaf, 0), axis=rows, keepdims=True)
    return jnp.where(present | finite, leaf, substitute.astype(leaf.dtype))


def _positions(leaf: Array, rows: Sequence[int]) -> Array:
    """The number of each row, over the axes ``rows`` in order."""
    number: Any = 0
    for d in rows:
        number = number * leaf.shape[d] + jax.lax.broadcasted_iota(
            jnp.int32, [size if e in rows else 1 for e, size in enumerate(leaf.shape)], d
        )
    return number
