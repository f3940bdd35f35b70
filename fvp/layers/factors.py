"""Kronecker factors out of the rows of a capture."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.layers.capture import Capture
from fvp.layers.groups import Rows, labels
from fvp.layers.kronecker import KroneckerBlock
from fvp.layers.products import einsum
from fvp.layers.rows import CHUNK, LayerRows, scan_examples
from fvp.layers.squares import squared_lookup
from fvp.layers.uses import Use
from fvp.layers.views import Layout

WEIGHT_SHARING = ("expand", "reduce")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static: what becomes one block.

    Attributes:
      group: number of the group of uses.
      layouts: of the weight, and of its bias.
      swapped: for each use, whether its inputs are the outputs of the first (a tied embedding).
      lookup: whether the inputs of some use are one-hot: then the left factor is diagonal.
    """

    group: int
    layouts: tuple[Layout, ...]
    swapped: tuple[bool, ...]
    lookup: bool


def plans_of(captured: LayerRows, fallback: str | None) -> tuple[list[Plan], dict[int, str]]:
    """One plan for each group, biases with their layers; and the leaves that have none, with why.

    Raises where the uses of a parameter do not fit together and there is no fallback.
    """
    layers, groups = captured.layers, captured.groups
    biases = _joined(captured)
    orientations = [_orientations(layers, [layers.uses[i] for i in group]) for group in groups]
    unserved = {use.view.leaf: use.primitive for use in layers.lost}
    for group, swapped in zip(groups, orientations, strict=True):
        if swapped is None:
            uses = [layers.uses[i] for i in group]
            unserved[uses[0].view.leaf] = "overlapping uses"
            if fallback is None:
                names = ", ".join(use.primitive for use in uses)
                raise ValueError(
                    f"{layers.paths[uses[0].view.leaf]}: its uses ({names}) overlap in different"
                    " layouts and have no common Kronecker factors; pass"
                    ' fallback="per_example" for its exact diagonal instead.'
                )
    served = lambda number: layers.uses[groups[number][0]].view.leaf not in unserved
    biases = {weight: bias for weight, bias in biases.items() if served(weight) and served(bias)}
    plans = []
    for number, (group, swapped) in enumerate(zip(groups, orientations, strict=True)):
        if swapped is None or not served(number) or number in biases.values():
            continue
        uses = [layers.uses[i] for i in group]
        layouts = [uses[0].layout]
        if number in biases:
            layouts.append(layers.uses[groups[biases[number]][0]].layout)
        lookup = any(use.kind == "lookup" for use in uses)
        plans.append(Plan(number, tuple(layouts), swapped, lookup))
    return plans, unserved


def _joined(captured: LayerRows) -> dict[int, int]:
    """Groups of weights, and the group of the bias that every use of theirs, and no other, has."""
    layers, found = captured.layers, {}
    owners = {id(layers.uses[i]): number for number, g in enumerate(captured.groups) for i in g}
    for number, group in enumerate(captured.groups):
        uses = [layers.uses[i] for i in group]
        targets = [use.joined for use in uses]
        if any(target is None or id(target) not in owners for target in targets):
            continue
        weight = {owners[id(target)] for target in targets}
        theirs = [layers.uses[i] for i in captured.groups[weight.pop()]]
        plain = all(use.view.factor is None for use in (*uses, *theirs))
        matched = {id(use) for use in theirs} == {id(target) for target in targets}
        one_each = len(theirs) == len(uses) and not weight
        if plain and matched and one_each and all(use.kind != "lookup" for use in theirs):
            found.setdefault(owners[id(theirs[0])], number)
    return found


def _orientations(layers: Capture, uses: list[Use]) -> tuple[bool, ...] | None:
    """For each use, whether its weight is the transpose of the first's; None if it is neither."""
    if any(use.view.mixes for use in uses):
        return None
    if len(uses) == 1:
        return (False,)
    shape = layers.shapes[uses[0].view.leaf].shape
    tables = [labels(use, shape) for use in uses]
    swapped = []
    for table in tables:
        if np.array_equal(table, tables[0]):
            swapped.append(False)
        elif np.array_equal(table.transpose(0, 2, 1), tables[0]):
            swapped.append(True)
        else:
            return None
    return tuple(swapped)


def input_side(plan: Plan, number: int, use: Use, x: Any, examples: int, reduce: bool) -> Array:
    """The inputs (E, R, G, inputs) of a use, or the indices (E, R, G) of a lookup."""
    if x is None:
        x = jnp.ones((examples, 1, use.layout.shape[0], 1))
    elif use.kind == "lookup" and (reduce or plan.swapped[number]):
        x = jax.nn.one_hot(x, use.layout.shape[1])
    if len(plan.layouts) > 1:
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    return x.mean(1, keepdims=True) if reduce else x


def kronecker_blocks(captured: LayerRows, plans: list[Plan], reduce: bool) -> list[KroneckerBlock]:
    """The factors: left sum_e w_e mean_r x x^T, right sum_k sum_e sum_r d d^T."""
    inputs = [_inputs(captured, plan, reduce) for plan in plans]

    def output_moments(rows: list[Rows]) -> list[list[Array]]:
        return [_of_outputs(plan, rows[plan.group], reduce) for plan in plans]

    blocks = []
    for plan, xs, outputs in zip(plans, inputs, captured.sum(output_moments), strict=True):
        size = plan.layouts[0].shape[1]
        pairs = []
        for x, output, swapped in zip(xs, outputs, plan.swapped, strict=True):
            if jnp.issubdtype(x.dtype, jnp.integer):
                moment = _histogram(x, captured.shares, size)
            else:
                moment = _moment(x, plan.lookup and not swapped, captured.shares)
            moment = (moment / x.shape[1]).astype(output.dtype)
            pairs.append((output, moment) if swapped else (moment, output))
        left, right = _combined(pairs, [x.shape[1] for x in xs], any(plan.swapped))
        blocks.append(KroneckerBlock(left, right, None, None, plan.layouts))
    return blocks


def _combined(pairs: list[Any], rows: list[int], mixed: bool) -> tuple[Array, Array]:
    """One pair of factors for several uses of a weight."""
    if not mixed:  # uses are like rows: mean of the inputs, sum of the cotangents
        lefts = [left * (count / sum(rows)) for (left, _), count in zip(pairs, rows, strict=True)]
        return functools.reduce(jnp.add, lefts), functools.reduce(jnp.add, [p[1] for p in pairs])
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


def _inputs(captured: LayerRows, plan: Plan, reduce: bool) -> list[Array]:
    numbers, examples = captured.groups[plan.group], captured.shares.size
    return [
        input_side(plan, i, captured.layers.uses[number], captured.inputs[number], examples, reduce)
        for i, number in enumerate(numbers)
    ]


def _of_outputs(plan: Plan, rows: Rows, reduce: bool) -> list[Array]:
    """The second moment of the cotangents of each use."""
    moments = []
    for delta, swapped in zip(rows.outputs, plan.swapped, strict=True):
        delta = delta.sum(2, keepdims=True) if reduce else delta
        moments.append(_moment(delta, plan.lookup and swapped))
    return moments


def _moment(x: Array, diagonal: bool, shares: Any = None) -> Array:
    """Second moment of (..., G, features) over all axes in front, weighted over the examples."""
    if shares is not None:
        x = x * jnp.sqrt(shares).reshape(-1, 1, 1, 1)
    if diagonal:
        return jnp.sum(x**2, axis=tuple(range(x.ndim - 2)))
    x = jnp.moveaxis(x, -2, 0)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return einsum("gni,gnj->gij", x, x)


def _histogram(x: Array, shares: Array, size: int) -> Array:
    """(G, size): the weight of each index, for x of shape (E, R, G)."""
    weights = jnp.broadcast_to(shares[:, None], x.shape[:2]).ravel()

    def count(index: Array) -> Array:
        return jnp.zeros(size, weights.dtype).at[index].add(weights, mode="drop")

    return jax.vmap(count)(jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1))


def with_corrected_eigenvalues(
    captured: LayerRows, plans: list[Plan], blocks: list[KroneckerBlock]
) -> list[KroneckerBlock]:
    """EK-FAC: the eigenvalues become the second moments of the gradients in the eigenbases."""
    bases = [block.eigenbases() for block in blocks]
    turn = lambda x, basis: x if basis is None else einsum("...gi,gij->...gj", x, basis)

    def moments(rows: list[Rows]) -> list[Array]:
        found = []
        for plan, (left, right) in zip(plans, bases, strict=True):
            xs, pairs = _inputs(captured, plan, False), []
            for x, delta, swapped in zip(xs, rows[plan.group].outputs, plan.swapped, strict=True):
                a, b = (delta, x) if swapped else (x, delta)
                pairs.append((turn(a, left), turn(b, right)))
            found.append(_squares(pairs, plan.layouts[0].shape[1]))
        return found

    values = captured.sum(moments)
    return [
        dataclasses.replace(block, corrected=value, bases=basis)
        for block, value, basis in zip(blocks, values, bases, strict=True)
    ]


def _squares(pairs: list[Any], size: int) -> Array:
    """Sum over columns and examples of the squared gradients (G, I, O)."""
    a, b = pairs[0]
    if len(pairs) == 1 and a.ndim == 3:
        return squared_lookup(size, a, b)
    if len(pairs) == 1 and b.shape[-3] == 1:
        return einsum("ergi,ergo->gio", a**2, jnp.sum(b**2, axis=0))
    pairs = [(jax.nn.one_hot(a, size, dtype=b.dtype) if a.ndim == 3 else a, b) for a, b in pairs]
    columns = max(x.shape[0] for pair in pairs for x in pair if x.ndim == 5)
    spread = lambda x: jnp.broadcast_to(x, (columns, *x.shape[-4:]))
    data = [tuple(jnp.moveaxis(spread(x), 1, 0) for x in pair) for pair in pairs]

    def some(data: Any) -> Array:
        gradient = sum(einsum("ekrgi,ekrgo->ekgio", a, b) for a, b in data)
        return jnp.sum(jnp.square(gradient), axis=(0, 1))

    a, b = data[0]
    entries = columns * a.shape[-1] * b.shape[-1] * b.shape[-2]
    return scan_examples(some, data, max(1, CHUNK // entries))
