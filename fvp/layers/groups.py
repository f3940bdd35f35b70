"""Which uses of a parameter must be added up before anything is squared."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.layers.products import einsum
from fvp.tracing.capture import Capture
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.steps import Reshape, Shape
from fvp.tracing.uses import ParameterUse

if TYPE_CHECKING:
    from jaxtyping import Float


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


def disjoint(uses: Sequence[ParameterUse], shape: Shape) -> bool:
    """Whether no entry of a parameter of ``shape`` is read by two of ``uses``."""
    if any(use.view.functions for use in uses):
        return False
    seen = np.zeros(math.prod(shape), bool)
    for use in uses:
        entries = use.layout.entries(shape).ravel()
        entries = entries[entries >= 0]
        if seen[entries].any():
            return False
        seen[entries] = True
    return True


def standing_for(uses: Sequence[ParameterUse], shape: Shape) -> ParameterUse | None:
    """One use for several shifts and scales of a leaf of ``shape``, whose gradients are added up.

    In their own layout where they share one, else in that of the flat leaf. None for uses of other
    kinds, and for a single one that needs no other.
    """
    first = uses[0]
    if not all(use.is_elementwise for use in uses):
        return None
    exotic = any(use.view.functions or use.view.weighted or use.scattered for use in uses)
    if not exotic and all(use.layout == first.layout for use in uses):
        return None if len(uses) == 1 else dataclasses.replace(first, joined=None)
    flat = (math.prod(shape),)
    view = ParameterView.of(first.view.leaf, shape).then(Reshape(shape, flat), flat)
    return ParameterUse(
        "shift", view, first.primitive, first.batch_axes, flat, parts=((), (), (0,))
    )


def one_hot_inputs(use: ParameterUse, x: Array | None, like: Array) -> Array:
    """The inputs (..., R, G, I) of a use, as numbers: ones for shifts, one-hot for lookups."""
    if x is None:
        return jnp.ones((*like.shape[-4:-1], 1), like.dtype)
    if use.kind == "lookup":
        return jax.nn.one_hot(x, use.layout.shape[1], dtype=like.dtype)
    return x


@dataclasses.dataclass(frozen=True)
class GroupGradients:
    """The gradients of one group of uses, as the two sides of each: inputs and output cotangents.

    Attributes:
      uses: the uses.
      inputs: for each (E, R, G, I); indices (E, R, G) of a lookup; None for ones.
      outputs: for each (K, E, R, G, O).
    """

    uses: tuple[ParameterUse, ...]
    inputs: tuple[Array | None, ...]
    outputs: tuple[Array, ...]

    @property
    def leaf(self) -> int:
        """The number of the parameter leaf."""
        return self.uses[0].view.leaf

    def gradients(self) -> Float[Array, "K E ..."]:
        """The gradient of every column and example with respect to the leaf."""
        total: Any = 0
        for use, x, delta in zip(self.uses, self.inputs, self.outputs, strict=True):
            x = one_hot_inputs(use, x, delta).astype(delta.dtype)
            total += use.layout.leaf(einsum("ergi,kergo->kegio", x, delta))
        return total

    def merged(self, shape: Shape) -> GroupGradients:
        """The same as one use, where `standing_for` has one for a leaf of ``shape``."""
        use = standing_for(self.uses, shape)
        if use is None:
            return self
        if use.layout == self.uses[0].layout:
            outputs = functools.reduce(jnp.add, self.outputs)
        else:
            gradients = self.gradients()
            outputs = gradients.reshape(*gradients.shape[:2], 1, 1, -1)
        return GroupGradients((use,), (None,), (outputs,))
