"""Inner products of the per-example gradients of a batch, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.captured_batch import CHUNK, LayerRows
from fvp.layers.groups import Rows
from fvp.layers.products import einsum


def gram_matrix(captured: LayerRows, lost: Any) -> Array:
    """(K E, K E): A A^T for the rows A_ke = column_ke^T J of all columns and examples.

    Where a weight is used once per example its share is (x_e . x_f) (d_ke . d_lf), and no gradient
    is formed. ``lost(columns)`` gives the rows (K, E, entries) of the leaves without a layer rule,
    or is None.
    """
    columns = captured.columns.all()
    total: Any = 0.0
    served = set(captured.lost)
    for rows in captured.rows(columns):
        if rows.uses[0].view.leaf not in served:
            leaf = rows.uses[0].view.leaf
            total += _gram(rows.merged(captured.layers.shapes[leaf].shape))
    if lost is not None:
        total += _outer(lost(columns))
    return total


def _gram(rows: Rows) -> Array:
    use, x, delta = rows.uses[0], rows.inputs[0], rows.outputs[0]
    if len(rows.uses) > 1 or use.view.functions or use.view.weighted:
        return _outer(rows.gradients().reshape(*delta.shape[:2], -1))
    if delta.shape[2] > 1:
        return _outer_by_inputs(rows)
    columns, examples = delta.shape[:2]
    delta = delta[:, :, 0].reshape(columns * examples, *delta.shape[3:])
    total: Any = 0.0
    for group in range(delta.shape[1]):
        outputs = einsum("no,mo->nm", delta[:, group], delta[:, group])
        if x is None:
            total += outputs
            continue
        inputs = x[:, 0, group]
        if use.kind == "lookup":
            same = _same(inputs[:, None], inputs[None], use.layout.shape[1]).astype(delta.dtype)
        else:
            same = einsum("ei,fi->ef", inputs, inputs)
        total += outputs * jnp.tile(same, (columns, columns))
    return total


def _outer(gradients: Array) -> Array:
    flat = gradients.reshape(gradients.shape[0] * gradients.shape[1], -1)
    return einsum("np,mp->nm", flat, flat)


def _outer_by_inputs(rows: Rows) -> Array:
    """Through the gradients, over some of the layer's inputs at a time."""
    (x,), (delta,), (use,) = rows.inputs, rows.outputs, rows.uses
    if use.kind == "lookup":
        return _lookups(x, delta, use.layout.shape[1])
    size = max(1, CHUNK // (math.prod(delta.shape[:2]) * delta.shape[3] * delta.shape[4]))
    part = lambda x: _outer(einsum("ergi,kergo->kegio", x, delta).reshape(*delta.shape[:2], -1))
    inputs = x.shape[-1]
    if size >= inputs:
        return part(x)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, -inputs % size)])
    parts = jnp.moveaxis(x.reshape(*x.shape[:3], -1, size), 3, 0)
    count = math.prod(delta.shape[:2])
    zero = jnp.zeros((count, count), delta.dtype)
    return jax.lax.scan(lambda total, x: (total + part(x), None), zero, parts)[0]


def _same(a: Array, b: Array, size: int) -> Array:
    """Whether two lookups in a table of ``size`` read the same entry: out of range reads none."""
    return (a == b) & (a < size)


def _lookups(x: Array, delta: Array, size: int) -> Array:
    """Rows that look up the same entry, in whichever example."""
    columns, examples = delta.shape[:2]

    def pair(e: Array) -> Array:
        same = _same(x[e][None, :, None], x[:, None, :], size)  # (F, R, S, G)
        same = same.astype(delta.dtype)
        return einsum("frsg,krgo,lfsgo->klf", same, delta[:, e], delta)

    gram = jax.lax.map(pair, jnp.arange(examples))  # (E, K, L, F)
    return gram.transpose(1, 0, 2, 3).reshape(columns * examples, columns * examples)
