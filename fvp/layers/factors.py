"""Kronecker factors out of the rows of a capture."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.layers.captured_batch import CHUNK, LayerRows, scan_examples
from fvp.layers.groups import Rows, standing_for
from fvp.layers.kronecker import KroneckerBlock
from fvp.layers.products import einsum
from fvp.layers.squares import squared_lookup
from fvp.tracing.capture import Capture
from fvp.tracing.coverage import treatment
from fvp.tracing.layouts import Layout
from fvp.tracing.uses import Use

WEIGHT_SHARING = ("expand", "reduce")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static: what becomes one block.

    Attributes:
      group: number of the group of uses.
      layouts: of the weight, and of its bias.
      swapped: for each use, whether its inputs are the outputs of the first (a tied embedding).
      lookup: whether the inputs of some use are one-hot: then the left factor is diagonal.
      merged: whether one use stands for those of the group.
    """

    group: int
    layouts: tuple[Layout, ...]
    swapped: tuple[bool, ...]
    lookup: bool
    merged: bool


def plans_of(captured: LayerRows, fallback: str | None) -> tuple[list[Plan], dict[int, str]]:
    """One plan for each group, biases with their layers; and the leaves that have none, with why.

    Raises where the uses of a parameter do not fit together and there is no fallback.
    """
    layers, groups = captured.layers, captured.groups
    unserved = {use.view.leaf: use.primitive for use in layers.lost}
    biases = _joined(captured)
    plans: dict[int, Plan] = {}
    for number, group in enumerate(groups):
        if number in biases.values():
            continue
        leaf = layers.uses[group[0]].view.leaf
        plan = _plan(layers, number, [layers.uses[i] for i in group])
        if plan is not None:
            plans[number] = plan
            continue
        uses = [layers.uses[i] for i in group]
        names = ", ".join(dict.fromkeys(f"{treatment(u)} in {u.primitive!r}" for u in uses))
        unserved[leaf] = names
        if fallback is None:
            raise ValueError(
                f"{layers.paths[leaf]}: its uses ({names}) go through functions of the parameter"
                " or overlap in different layouts, and have no common Kronecker factors; pass"
                ' fallback="per_example" for its exact diagonal instead.'
            )
    leaf_of = lambda number: layers.uses[groups[number][0]].view.leaf
    for weight, bias in biases.items():
        own = _plan(layers, bias, [layers.uses[i] for i in groups[bias]])
        assert own is not None
        if weight in plans and leaf_of(bias) not in unserved and leaf_of(weight) not in unserved:
            layouts = (*plans[weight].layouts, *own.layouts)
            plans[weight] = dataclasses.replace(plans[weight], layouts=layouts)
        else:
            plans[bias] = own
    served = [number for number in sorted(plans) if leaf_of(number) not in unserved]
    return [plans[number] for number in served], unserved


def _plan(layers: Capture, number: int, uses: list[Use]) -> Plan | None:
    """The block of the uses of one group; None where they have no common Kronecker factors."""
    shape = layers.shapes[uses[0].view.leaf].shape
    if (one := standing_for(uses, shape)) is not None:
        return Plan(number, (one.layout,), (False,), lookup=False, merged=True)
    if any(use.view.functions or use.view.weighted for use in uses):
        return None
    layout, swapped = uses[0].layout, _orientations(uses, shape)
    if swapped is None:
        return None
    lookup = any(use.kind == "lookup" for use in uses)
    return Plan(number, (layout,), swapped, lookup, merged=False)


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
        plain = all(_joinable(use) for use in (*uses, *theirs))
        kinds = lambda use: [kind for kind, _ in use.scans]
        plain &= len({tuple(kinds(use)) for use in (*uses, *theirs)}) == 1
        matched = {id(use) for use in theirs} == {id(target) for target in targets}
        one_each = len(theirs) == len(uses) and not weight
        if plain and matched and one_each and all(use.kind != "lookup" for use in theirs):
            found.setdefault(owners[id(theirs[0])], number)
    return found


def _joinable(use: Use) -> bool:
    """Whether a weight and its bias may be one block: plain entries of their leaves."""
    view = use.view
    return view.factor is None and not (view.functions or view.weighted or use.embedded)


def _orientations(uses: list[Use], shape: tuple[int, ...]) -> tuple[bool, ...] | None:
    """For each use, whether its weight is the transpose of the first's; None if it is neither."""
    if len(uses) == 1:
        return (False,)
    tables = [use.layout.entries(shape) for use in uses]
    swapped = []
    for table in tables:
        if np.array_equal(table, tables[0]):
            swapped.append(False)
        elif np.array_equal(table.transpose(0, 2, 1), tables[0]):
            swapped.append(True)
        else:
            return None
    return tuple(swapped)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The input side of one use in a block: ``x`` (E, R, G, inputs), or indices (E, R, G).

    ``active`` is 1 where the use took place, else 0, broadcastable to (E, R, G).
    """

    x: Array
    active: Array

    @property
    def rows(self) -> Array:
        """(E,): how often each example used the weight, in every group."""
        return jnp.broadcast_to(self.active, self.x.shape[:3])[:, :, 0].sum(1)

    def moment(self, weights: Array, size: int, diagonal: bool) -> Array:
        """Second moment of the inputs, weighted by (E,) numbers; (G, size) where ``diagonal``."""
        weights = weights[:, None, None] * self.active
        if jnp.issubdtype(self.x.dtype, jnp.integer):
            return _histogram(self.x, jnp.broadcast_to(weights, self.x.shape), size)
        return _moment(self.x * jnp.sqrt(weights)[..., None], diagonal)


def input_side(captured: LayerRows, plan: Plan, i: int, reduce: bool) -> Inputs:
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


def kronecker_blocks(captured: LayerRows, plans: list[Plan], reduce: bool) -> list[KroneckerBlock]:
    """The factors: left sum_e w_e mean_r x x^T, right sum_k sum_e sum_r d d^T."""
    inputs = [_inputs(captured, plan, reduce) for plan in plans]

    def output_moments(rows: list[Rows]) -> list[list[Array]]:
        return [
            [
                _moment(delta.sum(2, keepdims=True) if reduce else delta, plan.lookup and swapped)
                for delta, swapped in zip(_outputs(captured, plan, rows), plan.swapped, strict=True)
            ]
            for plan in plans
        ]

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


def _combined(pairs: list[Any], tied: bool) -> tuple[Array, Array]:
    """One pair of factors for several uses of a weight."""
    if not tied:  # uses are like rows: mean of the inputs, sum of the cotangents
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


def _inputs(captured: LayerRows, plan: Plan, reduce: bool) -> list[Inputs]:
    return [input_side(captured, plan, i, reduce) for i in range(len(plan.swapped))]


def _outputs(captured: LayerRows, plan: Plan, rows: list[Rows]) -> tuple[Array, ...]:
    """The cotangents (K, E, R, G, outputs) of the uses of a plan."""
    group = rows[plan.group]
    if plan.merged:
        group = group.merged(captured.layers.shapes[group.uses[0].view.leaf].shape)
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
            outputs = _outputs(captured, plan, rows)
            for x, delta, swapped in zip(xs, outputs, plan.swapped, strict=True):
                a, b = (delta, x.x) if swapped else (x.x, delta)
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
