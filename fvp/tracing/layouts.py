"""A parameter as the weight of a layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.steps import Shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the entries of a leaf are a weight (G, I, O), see `uses.py`; hashable.

    ``parts`` are the axes of the view's core that are groups, inputs and outputs; the stacked axes
    are the slowest groups. Where the view embeds the leaf in zeros, ``kept`` are the numbers of the
    groups, inputs and outputs that are the leaf's.
    """

    view: ParameterView
    parts: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...] | None = None

    @property
    def stacks(self) -> Shape:
        """The lengths of the stacked axes."""
        return self.view.stack_lengths

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, inputs, outputs)."""
        return self.whole if self.kept is None else tuple(map(len, self.kept))  # pyright: ignore

    @property
    def whole(self) -> tuple[int, int, int]:
        """(groups, inputs, outputs) with those that are zeros."""
        groups, *sides = (math.prod(self.view.shape[d] for d in part) for part in self.parts)
        return (math.prod(self.stacks) * groups, *sides)  # pyright: ignore[reportReturnType]

    def weight(self, leaf: Any) -> Any:
        """The weight (G, I, O), out of a leaf; NumPy stays NumPy."""
        core, lead = self.view.core(leaf), len(self.stacks)
        order = [lead + d for part in self.parts for d in part]
        weight = core.transpose(*range(lead), *order).reshape(self.whole)
        return weight if self.kept is None else weight[np.ix_(*self.kept)]

    def entries(self, shape: Shape) -> np.ndarray:
        """Which entry of the leaf, of ``shape``, each of the weight is; -1 for none."""
        return self.weight(np.arange(1, math.prod(shape) + 1).reshape(shape)) - 1

    def leaf(self, weight: Any, *, squared: bool = False) -> Any:
        """The leaf's share of a gradient (..., G, I, O), or of ``squared`` ones."""
        if self.kept is not None:
            zeros = jnp.zeros((*weight.shape[:-3], *self.whole), weight.dtype)
            weight = zeros.at[(..., *np.ix_(*self.kept))].set(weight)
        front = weight.shape[:-3]
        order = [d for part in self.parts for d in part]
        lead = len(front) + len(self.stacks)
        core = weight.reshape(*front, *self.stacks, *(self.view.shape[d] for d in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        core = core.transpose(*range(lead), *(lead + d for d in back))
        return self.view.transpose(core, squared=squared)
