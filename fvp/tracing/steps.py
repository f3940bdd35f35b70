"""The steps from a parameter leaf to the core of a value: what each does, and its transpose.

Arrays are JAX's or NumPy's, and stay so: positions of entries are followed through steps in NumPy.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Shape: TypeAlias = tuple[int, ...]
Bounds: TypeAlias = tuple[int | None, int | None, int]  # start, stop and step
Window: TypeAlias = tuple[Bounds, ...]  # on each axis


class Step(abc.ABC):
    """One linear step; or a function, of which only the derivative is."""

    @abc.abstractmethod
    def forward(self, x: Any, lead: int) -> Any:
        """The step on ``x``, behind ``lead`` other axes; without what multiplies."""

    @abc.abstractmethod
    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        """The transposed derivative, behind ``lead`` further axes and those of the stacks."""

    def squared(self) -> Step:
        """The step that squares of gradients go back by, where no two entries meet."""
        return self


@dataclasses.dataclass(frozen=True)
class Reshape(Step):
    """From the shape ``old`` to the shape ``new``."""

    old: Shape
    new: Shape

    def forward(self, x: Any, lead: int) -> Any:
        return x.reshape(x.shape[:lead] + self.new)

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        return x.reshape(x.shape[: lead + stacks] + self.old)


@dataclasses.dataclass(frozen=True)
class Permute(Step):
    """The axes in another order."""

    order: tuple[int, ...]

    def forward(self, x: Any, lead: int) -> Any:
        return x.transpose(*range(lead), *(lead + d for d in self.order))

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        inverse = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        return Permute(inverse).forward(x, lead + stacks)


@dataclasses.dataclass(frozen=True)
class Slice(Step):
    """A window of what has the shape ``old``."""

    old: Shape
    window: Window

    def forward(self, x: Any, lead: int) -> Any:
        return _cut(x, self.window, lead)

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        return _embedded(x, self.old, self.window, lead + stacks)


@dataclasses.dataclass(frozen=True)
class Embed(Step):
    """Into a window of zeros of the shape ``new``."""

    new: Shape
    window: Window

    def forward(self, x: Any, lead: int) -> Any:
        return _embedded(x, self.new, self.window, lead)

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        return _cut(x, self.window, lead + stacks)


@dataclasses.dataclass(frozen=True, eq=False)
class Times(Step):
    """Times numbers, one for each entry."""

    factor: Any

    def forward(self, x: Any, lead: int) -> Any:
        return x

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        return x * self.factor.astype(x.dtype)

    def squared(self) -> Times:
        return Times(self.factor**2)


@dataclasses.dataclass(frozen=True)
class Unstack(Step):
    """One slice of the leading axis, which a scan runs over: from here on that is a stacked one."""

    length: int

    def forward(self, x: Any, lead: int) -> Any:
        return x

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Step):
    """Any differentiable function of the core; see `derived.py`.

    Attributes:
      function: of cores, of which one is that of this view.
      points: the cores, with the stacked axes in front, that it is differentiated at.
      index: number of the one that it is differentiated in.
      names: the primitives that it consists of.
    """

    function: Callable[..., Array]
    points: tuple[Array, ...]
    index: int
    names: tuple[str, ...]

    def forward(self, x: Any, lead: int) -> Any:
        raise TypeError("a core after a function is no linear image of the leaf")

    def transpose(self, x: Any, lead: int, stacks: int) -> Any:
        def at(points: tuple[Array, ...], cotangents: Array) -> Array:
            before, (point, *after) = points[: self.index], points[self.index :]
            value, vjp = jax.vjp(lambda x: self.function(*before, x, *after), point)
            transpose = lambda cotangent: vjp(cotangent.astype(value.dtype))[0]
            for _ in range(lead):
                transpose = jax.vmap(transpose)
            return transpose(cotangents)

        for _ in range(stacks):
            at = jax.vmap(at, in_axes=(0, lead), out_axes=lead)
        return at(self.points, x).astype(x.dtype)


def _cut(x: Any, window: Window, lead: int) -> Any:
    """The entries of ``x`` in a window, behind ``lead`` axes."""
    return x[(slice(None),) * lead + tuple(slice(*bounds) for bounds in window)]


def _embedded(x: Any, shape: Shape, window: Window, lead: int) -> Any:
    """Zeros of ``shape`` with ``x`` in a window of them, behind ``lead`` axes."""
    where = (slice(None),) * lead + tuple(slice(*bounds) for bounds in window)
    if isinstance(x, np.ndarray):
        out = np.zeros(x.shape[:lead] + shape, x.dtype)
        out[where] = x
        return out
    return jnp.zeros(x.shape[:lead] + shape, x.dtype).at[where].set(x)
