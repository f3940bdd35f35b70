"""Which uses of which parameters share one Kronecker-factored block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fvp.layers.captured_batch import CapturedBatch
from fvp.layers.groups import standing_for
from fvp.tracing.capture import Capture
from fvp.tracing.coverage import treatment
from fvp.tracing.layouts import Layout
from fvp.tracing.steps import Shape
from fvp.tracing.uses import ParameterUse


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


def plans_of(captured: CapturedBatch, fallback: str | None) -> tuple[list[Plan], dict[int, str]]:
    """One plan for each group, biases with their layers; and the leaves that have none, with why.

    Raises:
      ValueError: where the uses of a parameter do not fit together and there is no fallback.
    """
    layers, groups = captured.layers, captured.groups
    leaf_of = lambda number: layers.uses[groups[number][0]].view.leaf
    unhandled = {use.view.leaf: use.primitive for use in layers.unmatched}
    biases = _biases(captured)
    plans: dict[int, Plan] = {}
    for number, group in enumerate(groups):
        if number in biases.values():
            continue
        uses = [layers.uses[i] for i in group]
        plan = _plan(layers, number, uses)
        if plan is None:
            unhandled[leaf_of(number)] = _refused(layers, uses, fallback)
        else:
            plans[number] = plan
    for weight, bias in biases.items():
        own = _plan(layers, bias, [layers.uses[i] for i in groups[bias]])
        assert own is not None
        both = (leaf_of(weight), leaf_of(bias))
        if weight in plans and not any(leaf in unhandled for leaf in both):
            layouts = (*plans[weight].layouts, *own.layouts)
            plans[weight] = dataclasses.replace(plans[weight], layouts=layouts)
        else:
            plans[bias] = own
    handled = [number for number in sorted(plans) if leaf_of(number) not in unhandled]
    return [plans[number] for number in handled], unhandled


def _refused(layers: Capture, uses: Sequence[ParameterUse], fallback: str | None) -> str:
    """The uses of a leaf that have no common Kronecker factors, in words."""
    names = ", ".join(dict.fromkeys(f"{treatment(u)} in {u.primitive!r}" for u in uses))
    if fallback is None:
        raise ValueError(
            f"{layers.paths[uses[0].view.leaf]}: its uses ({names}) go through functions of the"
            " parameter, overlap in different layouts or read it scattered over a larger weight,"
            " and have no common Kronecker factors; pass"
            ' fallback="per_example" for its exact diagonal instead.'
        )
    return names


def _plan(layers: Capture, number: int, uses: list[ParameterUse]) -> Plan | None:
    """The block of the uses of one group; None where they have no common Kronecker factors."""
    shape = layers.shapes[uses[0].view.leaf].shape
    if (one := standing_for(uses, shape)) is not None:
        return Plan(number, (one.layout,), (False,), lookup=False, merged=True)
    if any(use.view.functions or use.view.weighted or use.scattered for use in uses):
        return None
    swapped = _orientations(uses, shape)
    if swapped is None:
        return None
    lookup = any(use.kind == "lookup" for use in uses)
    return Plan(number, (uses[0].layout,), swapped, lookup, merged=False)


def _biases(captured: CapturedBatch) -> dict[int, int]:
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
        plain = all(_is_plain(use) for use in (*uses, *theirs))
        kinds = lambda use: tuple(kind for kind, _ in use.scans)
        plain &= len({kinds(use) for use in (*uses, *theirs)}) == 1
        matched = {id(use) for use in theirs} == {id(target) for target in targets}
        one_each = len(theirs) == len(uses) and not weight
        if plain and matched and one_each and all(use.kind != "lookup" for use in theirs):
            found.setdefault(owners[id(theirs[0])], number)
    return found


def _is_plain(use: ParameterUse) -> bool:
    """Whether the entries of the weight are entries of the leaf, and the leaf is no part of it."""
    view = use.view
    return view.factor is None and not (view.functions or view.weighted or view.embedded)


def _orientations(uses: list[ParameterUse], shape: Shape) -> tuple[bool, ...] | None:
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
