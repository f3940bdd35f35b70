"""A parameter on its way to a use: reshaped, cut, embedded, scaled, broadcast, or any function.

A parameter view is how a value that does not depend on the batch depends on one leaf. Gradients go
back by its transposed derivative, step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Shape = tuple[int, ...]
Window = tuple[tuple[int | None, int | None, int], ...]  # start, stop and step on each axis


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A step that is any differentiable function of the core; see `derived.py`.

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

    def transpose(self, cotangents: Array, lead: int, stacks: int) -> Array:
        """The transposed derivative, behind ``lead`` further axes and those of the stacks."""

        def at(points: tuple[Array, ...], cotangents: Array) -> Array:
            before, (point, *after) = points[: self.index], points[self.index :]
            value, vjp = jax.vjp(lambda x: self.function(*before, x, *after), point)
            transpose = lambda cotangent: vjp(cotangent.astype(value.dtype))[0]
            for _ in range(lead):
                transpose = jax.vmap(transpose)
            return transpose(cotangents)

        for _ in range(stacks):
            at = jax.vmap(at, in_axes=(0, lead), out_axes=lead)
        return at(self.points, cotangents).astype(cotangents.dtype)


@dataclasses.dataclass(frozen=True)
class ParameterView:
    """The part of a value that is a function of parameter leaf number ``leaf``.

    Attributes:
      leaf: index in the flattened parameters.
      shape: shape of the core, the value before it was broadcast.
      ops: the steps from the leaf to the core: ("reshape", old, new), ("transpose", permutation),
        ("slice", old, window), ("embed", old, new, window) in zeros, ("times", array),
        ("unstack", length) and ("function", Function).
      dims: for each axis of the value, the axis of the core that it is, or None where the core is
        repeated.
      stacks: how many leading axes of the leaf were consumed by scans.
      factor: the core is multiplied by this number or array; None is one.
    """

    leaf: int
    shape: Shape
    ops: tuple[Any, ...] = ()
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
        return tuple(op[1] for op in self.ops if op[0] == "function")

    @property
    def weighted(self) -> bool:
        """Whether entries of the leaf enter times numbers of their own."""
        return any(op[0] == "times" for op in self.ops)

    @property
    def pure(self) -> bool:
        """Whether the value is the core itself: no axis repeated or moved since."""
        return self.dims == tuple(range(len(self.shape)))

    def then(self, op: Any, shape: Shape) -> ParameterView:
        """One more step of the core."""
        factor = self.factor
        if factor is not None and jnp.ndim(factor):
            factor = forward(op, factor)
        dims = tuple(range(len(shape)))
        return dataclasses.replace(self, ops=(*self.ops, op), shape=shape, dims=dims, factor=factor)

    def unstacked(self) -> ParameterView:
        """One slice of the leading axis, as a scan over the value sees it."""
        view = self.absorbed().then(("unstack", self.shape[0]), self.shape[1:])
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
        ops = (*self.ops, ("times", factor))
        return dataclasses.replace(self, ops=ops, factor=None)

    def core(self, leaf: Any) -> Any:
        """The core, with the stacked axes in front, out of a leaf; without what multiplies it."""
        stacks = 0
        for op in self.ops:
            if op[0] == "unstack":
                stacks += 1
            else:
                leaf = forward(op, leaf, stacks)
        return leaf

    def transpose(self, core: Any, *, squared: bool = False) -> Any:
        """The transposed derivative of :meth:`core`, of the leaf's shape behind any further axes.

        With ``squared`` that of entries that are squares of gradients: none may meet on the way.
        """
        lead = core.ndim - len(self.shape) - self.stacks
        stacks = self.stacks
        for op in reversed(self.ops):
            if op[0] == "unstack":
                stacks -= 1
            elif op[0] == "times":
                core = core * (op[1] ** 2 if squared else op[1]).astype(core.dtype)
            else:
                core = _transposed(op, core, lead, stacks)
        return core


def broadcast(x: Any, shape: Shape) -> Any:
    """``x`` over ``shape``; NumPy stays NumPy, which inside of a scan's body is no part of it."""
    return (jnp if isinstance(x, jax.Array) else np).broadcast_to(x, shape)


def forward(op: Any, x: Any, lead: int = 0) -> Any:
    """One step of the core, behind ``lead`` other axes; NumPy stays NumPy."""
    kind, front = op[0], x.shape[:lead]
    if kind == "reshape":
        return x.reshape(front + op[2])
    if kind == "transpose":
        return x.transpose(*range(lead), *(lead + d for d in op[1]))
    if kind == "times":
        return x
    if kind == "slice":
        return _cut(x, op[2], lead)
    if kind == "embed":
        return _embedded(x, op[2], op[3], lead)
    raise TypeError(f"a core after {kind!r} is no linear image of the leaf")


def _transposed(op: Any, x: Any, lead: int, stacks: int) -> Any:
    kind, axes = op[0], lead + stacks
    if kind == "function":
        return op[1].transpose(x, lead, stacks)
    if kind == "reshape":
        return x.reshape(x.shape[:axes] + op[1])
    if kind == "transpose":
        inverse = sorted(range(len(op[1])), key=op[1].__getitem__)
        return x.transpose(*range(axes), *(axes + d for d in inverse))
    if kind == "embed":
        return _cut(x, op[3], axes)
    return _embedded(x, op[1], op[2], axes)


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
