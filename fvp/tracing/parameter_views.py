"""A parameter on its way to a use: reshaped, cut, embedded, scaled, broadcast, or any function.

A parameter view is how a value that does not depend on the batch depends on one leaf. Gradients go
back by its transposed derivative, step by step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvp.tracing.steps import Embed, Function, Shape, Step, Times, Unstack


@dataclasses.dataclass(frozen=True)
class ParameterView:
    """The part of a value that is a function of parameter leaf number ``leaf``.

    Attributes:
      leaf: index in the flattened parameters.
      shape: shape of the core, the value before it was broadcast.
      steps: from the leaf to the core.
      dims: for each axis of the value, the axis of the core that it is, or None where the core is
        repeated.
      stacks: how many leading axes of the leaf were consumed by scans.
      factor: the core is multiplied by this number or array; None is one.
    """

    leaf: int
    shape: Shape
    steps: tuple[Step, ...] = ()
    dims: tuple[int | None, ...] = ()
    stacks: int = 0
    factor: Any = None

    @classmethod
    def of(cls, leaf: int, shape: Shape) -> ParameterView:
        """The leaf itself."""
        return cls(leaf, shape, dims=tuple(range(len(shape))))

    @property
    def functions(self) -> tuple[Function, ...]:
        """The steps that are functions: no entry of the core is an entry of the leaf then."""
        return tuple(step for step in self.steps if isinstance(step, Function))

    @property
    def weighted(self) -> bool:
        """Whether entries of the leaf enter times numbers of their own."""
        return any(isinstance(step, Times) for step in self.steps)

    @property
    def embedded(self) -> bool:
        """Whether zeros, or other parameters, are beside the leaf."""
        return any(isinstance(step, Embed) for step in self.steps)

    @property
    def stack_lengths(self) -> Shape:
        """The lengths of the axes of the leaf that were consumed by scans."""
        return tuple(step.length for step in self.steps if isinstance(step, Unstack))

    @property
    def pure(self) -> bool:
        """Whether the value is the core itself: no axis repeated or moved since."""
        return self.dims == tuple(range(len(self.shape)))

    def then(self, step: Step, shape: Shape) -> ParameterView:
        """One more step of the core."""
        factor = self.factor
        if factor is not None and jnp.ndim(factor):
            factor = step.forward(factor, 0)
        dims = tuple(range(len(shape)))
        return dataclasses.replace(
            self, steps=(*self.steps, step), shape=shape, dims=dims, factor=factor
        )

    def unstacked(self) -> ParameterView:
        """One slice of the leading axis, as a scan over the value sees it."""
        view = self.absorbed().then(Unstack(self.shape[0]), self.shape[1:])
        return dataclasses.replace(view, stacks=self.stacks + 1)

    def spread(self, old: Shape, new: Shape) -> ParameterView:
        """The value repeated along its axes of length one, as elementwise primitives do."""
        if old == new:
            return self
        if not old:
            return dataclasses.replace(self, dims=(None,) * len(new))
        pairs = zip(self.dims, old, new, strict=True)
        dims = tuple(dim if before == after else None for dim, before, after in pairs)
        return dataclasses.replace(self, dims=dims)

    def scaled(self, factor: Any) -> ParameterView:
        """The value times ``factor``, which broadcasts to the core."""
        factor = factor if self.factor is None else self.factor * factor
        return dataclasses.replace(self, factor=factor)

    def absorbed(self) -> ParameterView:
        """The same with the factor as one of the steps."""
        if self.factor is None:
            return self
        factor = broadcast(self.factor, self.shape)
        return dataclasses.replace(self, steps=(*self.steps, Times(factor)), factor=None)

    def core(self, leaf: Any) -> Any:
        """The core, with the stacked axes in front, out of a leaf; without what multiplies it."""
        stacks = 0
        for step in self.steps:
            leaf = step.forward(leaf, stacks)
            stacks += isinstance(step, Unstack)
        return leaf

    def transpose(self, core: Any, *, squared: bool = False) -> Any:
        """The transposed derivative of `core`, of the leaf's shape behind any further axes.

        With ``squared`` that of entries that are squares of gradients: none may meet on the way.
        """
        lead, stacks = core.ndim - len(self.shape) - self.stacks, self.stacks
        for step in reversed(self.steps):
            stacks -= isinstance(step, Unstack)
            core = (step.squared() if squared else step).transpose(core, lead, stacks)
        return core


def broadcast(x: Any, shape: Shape) -> Any:
    """``x`` over ``shape``; NumPy stays NumPy, which inside of a scan's body is no part of it."""
    return (jnp if isinstance(x, jax.Array) else np).broadcast_to(x, shape)
