"""Kronecker factors: second moments of the inputs and of the output cotangents of a capture."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.captured_batch import CapturedBatch
from fvp.layers.groups import GroupGradients
from fvp.layers.kronecker import KroneckerBlock
from fvp.layers.plans import Plan
from fvp.layers.products import einsum

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT_SHARING = ("expand", "reduce")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The input side of one use in a block: ``x`` (E, R, G, I), or indices (E, R, G).

    ``active`` is 1 where the use took place, else 0, broadcastable to (E, R, G).
    """

    x: Array
    active: Array

    @property
    def rows(self) -> Float[Array, " E"]:
        """How often each example used the weight, in every group."""
        return jnp.broadcast_to(self.active, self.x.shape[:3])[:, :, 0].sum(1)

    def moment(self, weights: Float[Array, " E"], size: int, diagonal: bool) -> Array:
        """Second moment of the inputs, (G, I, I); (G, I) where ``diagonal``; I is ``size``."""
        weights = weights[:, None, None] * self.active
        if jnp.issubdtype(self.x.dtype, jnp.integer):
            return _histogram(self.x, jnp.broadcast_to(weights, self.x.shape), size)
        return _moment(self.x * jnp.sqrt(weights)[..., None], diagonal)


def _input_side(captured: CapturedBatch, plan: Plan, i: int, reduce: bool) -> Inputs:
    """The inputs of use number ``i`` of the group of a plan, with a one where it has a bias."""
    number = captured.groups[plan.group][i]
    use, x = captured.layers.uses[number], captured.inputs[number]
    examples, active = captured.shares.size, captured.layers.active[number]
    if x is None or plan.merged:
        x, active = jnp.ones((examples, 1, plan.layouts[0].shape[0], 1)), None
    elif use.kind == "lookup" and (reduce or plan.swapped[i]):
        x = jax.nn.one_hot(x, use.layout.shape[1])
    if len(plan.layouts) > 1:
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    active = jnp.ones((1, 1, 1)) if active is None else active[:, :, :1]
    if reduce:
        rows = jnp.maximum(jnp.broadcast_to(active, (*x.shape[:2], 1)).sum(1, keepdims=True), 1)
        x = jnp.sum(x * active[..., None], axis=1, keepdims=True) / rows[..., None]
        active = jnp.max(active, axis=1, keepdims=True)
    return Inputs(x, active)


def kronecker_blocks(
    captured: CapturedBatch, plans: list[Plan], reduce: bool
) -> list[KroneckerBlock]:
    """The factors: left sum_e w_e mean_r x x^T, right sum_k sum_e sum_r d d^T."""
    inputs = [input_sides(captured, plan, reduce) for plan in plans]

    def output_moments(groups: list[GroupGradients]) -> list[list[Array]]:
        return [_output_moments(captured, plan, groups, reduce) for plan in plans]

    blocks = []
    for plan, xs, outputs in zip(plans, inputs, captured.sum(output_moments), strict=True):
        tied, pairs = any(plan.swapped), []
        rows = functools.reduce(jnp.add, [x.rows for x in xs])
        for x, output, swapped in zip(xs, outputs, plan.swapped, strict=True):
            times = jnp.maximum(x.rows if tied else rows, 1)
            size = plan.layouts[0].shape[1]
            moment = x.moment(captured.shares / times, size, plan.lookup and not swapped)
            moment = moment.astype(output.dtype)
            pairs.append((output, moment) if swapped else (moment, output))
        left, right = _combined(pairs, tied)
        blocks.append(KroneckerBlock(left, right, None, None, plan.layouts))
    return blocks


def _output_moments(
    captured: CapturedBatch, plan: Plan, groups: list[GroupGradients], reduce: bool
) -> list[Array]:
    """For each use of a plan the second moment of its outputs' cotangents, summed over columns."""
    deltas = output_sides(captured, plan, groups)
    if reduce:
        deltas = tuple(delta.sum(2, keepdims=True) for delta in deltas)
    pairs = zip(deltas, plan.swapped, strict=True)
    return [_moment(delta, plan.lookup and swapped) for delta, swapped in pairs]


def _combined(pairs: list[tuple[Array, Array]], tied: bool) -> tuple[Array, Array]:
    """One pair of factors for several uses of a weight."""
    if not tied:  # as for rows: the mean of the inputs, the sum of the cotangents
        add = lambda moments: functools.reduce(jnp.add, moments)
        return add([left for left, _ in pairs]), add([right for _, right in pairs])
    # Inputs on one side meet cotangents: each use enters by its share of the trace, which is kept.
    traces = [(_trace(left), _trace(right)) for left, right in pairs]
    shares = [a * b for a, b in traces]
    total = sum(shares[1:], shares[0])
    safe = lambda x: jnp.where(x > 0, x, 1)
    left = sum(p[0] * (n / safe(t[0])) for p, n, t in zip(pairs, shares, traces, strict=True))
    right = sum(p[1] * (n / safe(t[1])) for p, n, t in zip(pairs, shares, traces, strict=True))
    return jnp.asarray(left), jnp.asarray(right / safe(total))


def _trace(moment: Array) -> Array:
    return jnp.sum(moment) if moment.ndim == 2 else jnp.trace(moment, axis1=1, axis2=2).sum()


def input_sides(captured: CapturedBatch, plan: Plan, reduce: bool) -> list[Inputs]:
    """The inputs of the uses of a plan."""
    return [_input_side(captured, plan, i, reduce) for i in range(len(plan.swapped))]


def output_sides(
    captured: CapturedBatch, plan: Plan, groups: list[GroupGradients]
) -> tuple[Float[Array, "K E R G O"], ...]:
    """The cotangents of the outputs of the uses of a plan."""
    group = groups[plan.group]
    if plan.merged:
        group = group.merged(captured.layers.shapes[group.leaf].shape)
    return group.outputs


def _moment(x: Array, diagonal: bool) -> Array:
    """Second moment of (..., G, features) over all axes in front."""
    if diagonal:
        return jnp.sum(x**2, axis=tuple(range(x.ndim - 2)))
    x = jnp.moveaxis(x, -2, 0)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return einsum("gni,gnj->gij", x, x)


def _histogram(x: Array, weights: Array, size: int) -> Array:
    """(G, size): the weight of each index, for both of shape (E, R, G)."""

    def count(index: Array, weights: Array) -> Array:
        return jnp.zeros(size, weights.dtype).at[index].add(weights, mode="drop")

    flat = lambda x: jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1)
    return jax.vmap(count)(flat(x), flat(weights))
