"""Inner products of the per-example gradients of a batch, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.captured_batch import CapturedBatch
from fvp.layers.chunks import CHUNK, sum_in_chunks
from fvp.layers.groups import GroupGradients
from fvp.layers.products import einsum

if TYPE_CHECKING:
    from jaxtyping import Float


def gram_matrix(
    captured: CapturedBatch, unmatched: Callable[[Array], Array] | None
) -> Float[Array, "KE KE"]:
    """A A^T, where A_ke = column_ke^T J for all columns k and examples e.

    Where a weight is used once per example its share is (x_e . x_f) (d_ke . d_lf), and no gradient
    is formed. ``unmatched(columns)`` gives the gradients (K, E, entries) of the leaves without a
    layer rule, or is None.
    """
    columns = captured.columns.all()
    total: Any = 0.0
    for group in captured.gradients(columns):
        if group.leaf not in captured.unmatched:
            total += _gram(group.merged(captured.layers.shapes[group.leaf].shape))
    if unmatched is not None:
        total += _outer(unmatched(columns))
    return total


def _gram(group: GroupGradients) -> Float[Array, "KE KE"]:
    use, x, delta = group.uses[0], group.inputs[0], group.outputs[0]
    if len(group.uses) > 1 or use.view.functions or use.view.weighted or use.scattered:
        return _outer(group.gradients())
    if delta.shape[2] > 1:
        return _outer_by_inputs(group)
    columns, examples = delta.shape[:2]
    delta = delta[:, :, 0].reshape(columns * examples, *delta.shape[3:])
    total: Any = 0.0
    for number in range(delta.shape[1]):
        outputs = einsum("no,mo->nm", delta[:, number], delta[:, number])
        if x is None:
            total += outputs
            continue
        inputs = x[:, 0, number]
        if use.kind == "lookup":
            same = _same(inputs[:, None], inputs[None], use.layout.shape[1]).astype(delta.dtype)
        else:
            same = einsum("ei,fi->ef", inputs, inputs)
        total += outputs * jnp.tile(same, (columns, columns))
    return total


def _outer(gradients: Float[Array, "K E ..."]) -> Float[Array, "KE KE"]:
    flat = gradients.reshape(gradients.shape[0] * gradients.shape[1], -1)
    return einsum("np,mp->nm", flat, flat)


def _outer_by_inputs(group: GroupGradients) -> Float[Array, "KE KE"]:
    """Through the gradients, over some of the layer's inputs at a time."""
    (x,), (delta,), (use,) = group.inputs, group.outputs, group.uses
    assert x is not None  # shifts are summed over their rows
    if use.kind == "lookup":
        return _lookups(x, delta, use.layout.shape[1])
    size = max(1, CHUNK // (math.prod(delta.shape[:2]) * delta.shape[3] * delta.shape[4]))
    some = lambda x: _outer(einsum("ierg,kergo->kegio", x, delta))
    return sum_in_chunks(some, jnp.moveaxis(x, -1, 0), size)


def _same(a: Array, b: Array, size: int) -> Array:
    """Whether two lookups in a table of ``size`` read the same entry: out of range reads none."""
    return (a == b) & (a < size)


def _lookups(x: Array, delta: Array, size: int) -> Float[Array, "KE KE"]:
    """The same where inputs are one-hot: rows meet where they look up the same entry."""
    columns, examples = delta.shape[:2]

    def pair(e: Array) -> Array:
        same = _same(x[e][None, :, None], x[:, None, :], size)  # (F, R, S, G)
        same = same.astype(delta.dtype)
        return einsum("frsg,krgo,lfsgo->klf", same, delta[:, e], delta)

    gram = jax.lax.map(pair, jnp.arange(examples))  # (E, K, L, F)
    return gram.transpose(1, 0, 2, 3).reshape(columns * examples, columns * examples)
