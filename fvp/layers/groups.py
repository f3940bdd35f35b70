"""Which uses of a parameter must be added up before anything is squared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.layers.capture import Capture
from fvp.layers.products import einsum
from fvp.layers.uses import Use


def groups_of(capture: Capture) -> list[tuple[int, ...]]:
    """The numbers of the uses, grouped: two uses that read a common entry are together."""
    by_leaf: dict[int, list[int]] = {}
    for number, use in enumerate(capture.uses):
        by_leaf.setdefault(use.view.leaf, []).append(number)
    groups: list[tuple[int, ...]] = []
    for leaf, numbers in by_leaf.items():
        uses = [capture.uses[number] for number in numbers]
        apart = len(uses) > 1 and disjoint(uses, capture.shapes[leaf].shape)
        groups += [(number,) for number in numbers] if apart else [tuple(numbers)]
    return groups


def disjoint(uses: Sequence[Use], shape: tuple[int, ...]) -> bool:
    """Whether no entry of a parameter of ``shape`` is read by two of ``uses``."""
    if any(use.view.mixes for use in uses):
        return False
    if sum(math.prod(use.view.shape) * _stacks(use) for use in uses) > math.prod(shape):
        return False
    seen = np.zeros(math.prod(shape), bool)
    for use in uses:
        entries = labels(use, shape).ravel()
        if seen[entries].any():
            return False
        seen[entries] = True
    return True


def labels(use: Use, shape: tuple[int, ...]) -> np.ndarray:
    """Which entry of the leaf each entry of the weight (groups, inputs, outputs) is."""
    return to_weight(use, np.arange(math.prod(shape)).reshape(shape))


def _stacks(use: Use) -> int:
    return math.prod(length for kind, length in use.scans if kind == "stacked")


def to_weight(use: Use, leaf: Any) -> Any:
    """The weight (groups, inputs, outputs) of a use, out of a leaf."""
    core = use.view.push(leaf)
    stacks = use.view.stacks
    core = core.reshape(-1, *core.shape[stacks:])
    parts = [use.weight(part) for part in core] if stacks else [use.weight(core[0])]
    if isinstance(leaf, np.ndarray):
        return np.concatenate(parts)
    return jnp.concatenate(parts)


def to_leaf(use: Use, weight: Array) -> Array:
    """A leaf of zeros with the weight (..., groups, inputs, outputs) of a use in its place."""
    lengths = [length for kind, length in use.scans if kind == "stacked"]
    lead = weight.shape[:-3]
    weight = weight.reshape(*lead, *lengths, -1, *weight.shape[-2:])
    core = use.core
    for _ in range(len(lead) + len(lengths)):
        core = jax.vmap(core)
    return use.view.pull(core(weight))


def input_size(use: Use) -> int:
    """How many inputs the weight of a use has."""
    if use.kind in ("shift", "scale"):
        return 1
    core = jax.ShapeDtypeStruct(use.view.shape, jnp.float32)
    return jax.eval_shape(use.weight, core).shape[1]


def one_hot_inputs(use: Use, x: Any, like: Array) -> Array:
    """The inputs (..., R, G, inputs) of a use, as numbers: ones for shifts, one-hot for lookups."""
    if x is None:
        return jnp.ones((*like.shape[-4:-1], 1), like.dtype)
    if use.kind == "lookup":
        return jax.nn.one_hot(x, input_size(use), dtype=like.dtype)
    return x


@dataclasses.dataclass(frozen=True)
class Rows:
    """The uses of one group: inputs (E, R, G, inputs) and outputs (K, E, R, G, outputs) of each."""

    uses: tuple[Use, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Array, ...]

    def gradients(self) -> Array:
        """The gradient of every column and example with respect to the leaf: (K, E, leaf)."""
        total: Any = 0
        for use, x, delta in zip(self.uses, self.inputs, self.outputs, strict=True):
            x = one_hot_inputs(use, x, delta).astype(delta.dtype)
            total += to_leaf(use, einsum("ergi,kergo->kegio", x, delta))
        return total
