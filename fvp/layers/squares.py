"""Sums of squared per-example gradients, without the gradients where the layer allows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.captured_batch import CHUNK, scan_examples
from fvp.layers.groups import Rows
from fvp.layers.products import einsum


def squared(rows: Rows, shape: tuple[int, ...]) -> Array:
    """The sum over columns and examples of the squared gradient in the leaf, of ``shape``."""
    rows = rows.merged(shape)
    use, x, delta = rows.uses[0], rows.inputs[0], rows.outputs[0]
    if len(rows.uses) > 1 or use.view.functions or (delta.shape[2] > 1 and use.kind != "lookup"):
        return squared_gradients(rows)
    if use.kind == "lookup":
        squares = squared_lookup(use.layout.shape[1], x, delta)
    elif x is None:  # the gradient itself
        squares = jnp.sum(delta**2, axis=(0, 1, 2))[:, None, :]
    else:
        squares = einsum("ergi,ergo->gio", x**2, jnp.sum(delta**2, axis=0))
    return use.layout.leaf(squares, squared=True)


def squared_lookup(size: int, x: Array, delta: Array) -> Array:
    """Squared gradients of a lookup in a table of ``size``: (groups, size, outputs).

    Rows of one example that look up the same entry are added up before they are squared.
    """
    if delta.shape[2] > 1:
        read = (x < size)[:, :, None]  # what is out of range reads nothing
        same = ((x[:, :, None] == x[:, None]) & read).astype(delta.dtype)  # (E, R, R, G)
        times = jnp.sqrt(jnp.maximum(same.sum(2), 1))
        delta = einsum("ersg,kesgo->kergo", same, delta) / times[None, ..., None]
    power = jnp.sum(delta**2, axis=0)

    def scatter(index: Array, power: Array) -> Array:
        return jnp.zeros((size, power.shape[-1]), power.dtype).at[index].add(power, mode="drop")

    groups = power.shape[2]
    power = jnp.moveaxis(power, 2, 0).reshape(groups, -1, power.shape[-1])
    return jax.vmap(scatter)(jnp.moveaxis(x, 2, 0).reshape(groups, -1), power)


def squared_gradients(rows: Rows) -> Array:
    """Through the per-example gradients themselves, a few examples at a time."""
    gradient = jax.eval_shape(rows.gradients)
    examples = rows.outputs[0].shape[1]
    size = max(1, CHUNK // max(1, math.prod(gradient.shape) // examples))

    def some(data: Any) -> Array:
        xs, deltas = data
        deltas = tuple(jnp.moveaxis(delta, 0, 1) for delta in deltas)
        return jnp.sum(Rows(rows.uses, xs, deltas).gradients() ** 2, axis=(0, 1))

    data = (rows.inputs, tuple(jnp.moveaxis(delta, 1, 0) for delta in rows.outputs))
    return scan_examples(some, data, size)
