"""Sums of squared per-example gradients, without the gradients where the layer allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.chunks import CHUNK, sum_in_chunks
from fvp.layers.groups import GroupGradients
from fvp.layers.products import einsum
from fvp.tracing.steps import Shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def squared(group: GroupGradients, shape: Shape) -> Array:
    """The sum over columns and examples of the squared gradient in the leaf, of ``shape``."""
    group = group.merged(shape)
    use, x, delta = group.uses[0], group.inputs[0], group.outputs[0]
    if len(group.uses) > 1 or use.view.functions or (delta.shape[2] > 1 and use.kind != "lookup"):
        return squared_gradients(group)
    if use.kind == "lookup" and x is not None:
        squares = squared_lookup(use.layout.shape[1], x, delta)
    elif x is None:  # the gradient itself
        squares = jnp.sum(delta**2, axis=(0, 1, 2))[:, None, :]
    else:
        squares = einsum("ergi,ergo->gio", x**2, jnp.sum(delta**2, axis=0))
    return use.layout.leaf(squares, squared=True)


def squared_lookup(
    size: int, x: Int[Array, "E R G"], delta: Float[Array, "K E R G O"]
) -> Float[Array, "G I O"]:
    """Squared gradients of a lookup in a table of ``size`` entries, I.

    What the rows of one example read of the same entry is added up before it is squared.
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


def squared_gradients(group: GroupGradients) -> Array:
    """Through the per-example gradients themselves, a few examples at a time."""
    gradient = jax.eval_shape(group.gradients)
    examples = group.outputs[0].shape[1]
    size = max(1, CHUNK // max(1, math.prod(gradient.shape) // examples))

    def some(data: Any) -> Array:
        xs, deltas = data
        deltas = tuple(jnp.moveaxis(delta, 0, 1) for delta in deltas)
        return jnp.sum(GroupGradients(group.uses, xs, deltas).gradients() ** 2, axis=(0, 1))

    data = (group.inputs, tuple(jnp.moveaxis(delta, 1, 0) for delta in group.outputs))
    return sum_in_chunks(some, data, size)
