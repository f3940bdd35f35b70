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
    if sum(math.prod(use.layout.shape) for use in uses) > math.prod(shape):
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
    return use.layout.weight(np.arange(math.prod(shape)).reshape(shape))


def one_hot_inputs(use: Use, x: Any, like: Array) -> Array:
    """The inputs (..., R, G, inputs) of a use, as numbers: ones for shifts, one-hot for lookups."""
    if x is None:
        return jnp.ones((*like.shape[-4:-1], 1), like.dtype)
    if use.kind == "lookup":
        return jax.nn.one_hot(x, use.layout.shape[1], dtype=like.dtype)
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
            total += use.layout.leaf(einsum("ergi,kergo->kegio", x, delta))
        return total
