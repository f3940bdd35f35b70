"""A parameter on its way to a use: reshaped, transposed, cut, scaled and broadcast.

All of these are linear, so the way back (for gradients) is the transposed way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

_SAME = (
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "pvary",
    "sharding_constraint",
    "reduce_precision",
)


_MAPS = (("dot_general", 0), ("dot_general", 1), ("gather", 0))


@dataclasses.dataclass(frozen=True)
class View:
    """A linear image of parameter leaf number ``leaf``.

    Attributes:
      leaf: index in the flattened parameters.
      ops: ("reshape", old, new), ("transpose", perm), ("slice", old, starts, limits, strides) and
        ("unstack", length) steps, and ("map", function, old) for other linear maps, from the leaf
        to the core.
      shape: shape of the core, the value before it was broadcast.
      dims: for each axis of the value, the axis of the core that it is, or None where the core is
        repeated.
      stacks: how many leading axes of the leaf were consumed by scans.
      factor: the core is multiplied by this number or array; None is one.
    """

    leaf: int
    shape: tuple[int, ...]
    ops: tuple[Any, ...] = ()
    dims: tuple[int | None, ...] = ()
    stacks: int = 0
    factor: Any = None

    @classmethod
    def of(cls, leaf: int, shape: tuple[int, ...]) -> View:
        """The leaf itself."""
        return cls(leaf, shape, dims=tuple(range(len(shape))))

    @property
    def mixes(self) -> bool:
        """Whether entries of the core are sums of entries of the leaf, or repeat them."""
        return any(op[0] == "map" for op in self.ops)

    @property
    def pure(self) -> bool:
        """Whether the value is the core itself: no axis repeated or moved since."""
        return self.dims == tuple(range(len(self.shape)))

    def then(self, op: Any, shape: tuple[int, ...]) -> View:
        """One more step of the core."""
        factor = self.factor
        if factor is not None and jnp.ndim(factor):
            factor = _forward(op, factor)
        dims = tuple(range(len(shape)))
        return dataclasses.replace(self, ops=(*self.ops, op), shape=shape, dims=dims, factor=factor)

    def unstacked(self) -> View:
        """One slice of the leading axis, as a scan over the value sees it."""
        view = self.then(("unstack", self.shape[0]), self.shape[1:])
        return dataclasses.replace(view, stacks=self.stacks + 1)

    def spread(self, old: tuple[int, ...], new: tuple[int, ...]) -> View:
        """The value repeated along its axes of length one, as elementwise primitives do."""
        if old == new:
            return self
        pairs = zip(self.dims, old, new, strict=True)
        dims = tuple(dim if before == after else None for dim, before, after in pairs)
        return dataclasses.replace(self, dims=dims)

    def scaled(self, factor: Any) -> View:
        """The value times ``factor``, which broadcasts to the core."""
        factor = factor if self.factor is None else self.factor * factor
        return dataclasses.replace(self, factor=factor)

    def push(self, leaf: Any) -> Any:
        """The core, with the stacked axes in front, from a leaf; without the factor."""
        stacks = 0
        for op in self.ops:
            if op[0] == "unstack":
                stacks += 1
            else:
                leaf = _forward(op, leaf, stacks)
        return leaf

    def pull(self, core: Any) -> Any:
        """The transpose of :meth:`push`; further axes in front are carried along."""
        lead = core.ndim - len(self.shape) - self.stacks
        stacks = self.stacks
        for op in reversed(self.ops):
            if op[0] == "unstack":
                stacks -= 1
            else:
                core = _backward(op, core, lead + stacks)
        return core


def _forward(op: Any, x: Any, lead: int = 0) -> Any:
    kind, front = op[0], x.shape[:lead]
    if kind == "map":
        return _over(op[1], lead)(x)
    if kind == "reshape":
        return x.reshape(front + op[2])
    if kind == "transpose":
        return x.transpose(*range(lead), *(lead + d for d in op[1]))
    slices = tuple(slice(*bounds) for bounds in zip(*op[2:], strict=True))
    return x[(slice(None),) * lead + slices]


def _over(function: Any, lead: int) -> Any:
    for _ in range(lead):
        function = jax.vmap(function)
    return function


def _backward(op: Any, x: Any, lead: int) -> Any:
    kind, front = op[0], x.shape[:lead]
    if kind == "map":
        old = jax.ShapeDtypeStruct(op[2].shape, op[2].dtype)
        transposed = jax.linear_transpose(op[1], old)
        narrow = lambda y: transposed(y.astype(jax.eval_shape(op[1], old).dtype))[0]
        return _over(narrow, lead)(x).astype(x.dtype)
    if kind == "reshape":
        return x.reshape(front + op[1])
    if kind == "transpose":
        inverse = sorted(range(len(op[1])), key=op[1].__getitem__)
        return x.transpose(*range(lead), *(lead + d for d in inverse))
    slices = tuple(slice(*bounds) for bounds in zip(*op[2:], strict=True))
    return jnp.zeros(front + op[1], x.dtype).at[(slice(None),) * lead + slices].set(x)


def structural(eqn: Any, position: int, view: View, others: list[Any]) -> list[View] | None:
    """The views that ``eqn`` makes of its operand number ``position``; None if it is a use.

    ``others`` are the other operands where they are constants (neither parameter nor batch), and
    None where they are not.
    """
    name, old = eqn.primitive.name, eqn.invars[position].aval.shape
    new = eqn.outvars[0].aval.shape
    if name in _SAME:
        return [view]
    if name in ("reshape", "squeeze", "expand_dims"):
        if view.pure:
            return [view.then(("reshape", old, new), new)]
        return _relabelled(view, old, new)
    if name == "transpose":
        perm = eqn.params["permutation"]
        if view.pure:
            return [view.then(("transpose", perm), new)]
        return [dataclasses.replace(view, dims=tuple(view.dims[d] for d in perm))]
    if name == "broadcast_in_dim":
        dims: list[int | None] = [None] * len(new)
        for source, target in enumerate(eqn.params["broadcast_dimensions"]):
            if old[source] == new[target]:
                dims[target] = view.dims[source]
        return [dataclasses.replace(view, dims=tuple(dims))]
    if name == "slice" and view.pure:
        p = eqn.params
        strides = p["strides"] or (1,) * len(old)
        op = ("slice", old, p["start_indices"], p["limit_indices"], strides)
        return [view.then(op, new)]
    if name == "split" and view.pure:
        return _split(eqn, view, old)
    return _mapped(eqn, position, view, others) or _arithmetic(eqn, position, view, others)


def _relabelled(view: View, old: Any, new: Any) -> list[View] | None:
    """A reshape of a broadcast value: only axes of length one may come and go."""
    kept = [(size, dim) for size, dim in zip(old, view.dims, strict=True) if size > 1]
    if [size for size, _ in kept] != [size for size in new if size > 1]:
        return None
    labels = iter(kept)
    dims = tuple(next(labels)[1] if size > 1 else None for size in new)
    return [dataclasses.replace(view, dims=dims)]


def _split(eqn: Any, view: View, old: tuple[int, ...]) -> list[View]:
    axis, start, parts = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(old), list(old)
        starts[axis], limits[axis] = start, start + size
        op = ("slice", old, tuple(starts), tuple(limits), (1,) * len(old))
        parts.append(view.then(op, (*old[:axis], size, *old[axis + 1 :])))
        start += size
    return parts


def _mapped(eqn: Any, position: int, view: View, others: list[Any]) -> list[View] | None:
    """Products with, and lookups of, constants: ``e @ W`` of a derivative, a learned position."""
    name = eqn.primitive.name
    constant = len(others) == 1 and others[0] is not None
    plain = view.pure and (view.factor is None or not jnp.ndim(view.factor))
    if not constant or not plain or (name, position) not in _MAPS:
        return None
    other = others[0]

    def forward(core: Any) -> Any:
        operands = (core, other) if position == 0 else (other, core)
        return eqn.primitive.bind(*operands, **eqn.params)

    shape = eqn.outvars[0].aval.shape
    return [view.then(("map", forward, eqn.invars[position].aval), shape)]


def _arithmetic(eqn: Any, position: int, view: View, others: list[Any]) -> list[View] | None:
    """Negation, and sums, products and quotients with constants."""
    name, old, new = eqn.primitive.name, eqn.invars[position].aval.shape, eqn.outvars[0].aval.shape
    if name == "neg":
        return [view.scaled(-1)]
    if len(others) != 1 or others[0] is None:
        return None
    constant = others[0]
    if name in ("add", "sub", "add_any"):
        view = view.scaled(-1) if name == "sub" and position == 1 else view
        return [view.spread(old, new)]
    if name == "mul" or (name == "div" and position == 0):
        if jnp.ndim(constant):
            axes = [dim for dim in view.dims if dim is not None]
            if old != new or axes != sorted(axes) or math.prod(old) != math.prod(view.shape):
                return None
            constant = jnp.broadcast_to(constant, old).reshape(view.shape)
        return [view.scaled(constant if name == "mul" else 1 / constant)]
    return None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the entries of a leaf are a weight (groups, inputs, outputs); hashable.

    ``parts`` are the axes of the view's core that are groups, inputs and outputs; the stacked axes
    are the slowest groups.
    """

    view: View
    parts: tuple[tuple[int, ...], ...]

    @property
    def stacks(self) -> tuple[int, ...]:
        """The lengths of the stacked axes."""
        return tuple(op[1] for op in self.view.ops if op[0] == "unstack")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, inputs, outputs)."""
        groups, *sides = (math.prod(self.view.shape[d] for d in part) for part in self.parts)
        return (math.prod(self.stacks) * groups, *sides)  # pyright: ignore[reportReturnType]

    def weight(self, leaf: Any) -> Any:
        """The weight (groups, inputs, outputs), out of a leaf; NumPy stays NumPy."""
        core, lead = self.view.push(leaf), len(self.stacks)
        order = [lead + d for part in self.parts for d in part]
        return core.transpose(*range(lead), *order).reshape(self.shape)

    def leaf(self, weight: Any) -> Any:
        """A leaf of zeros with the weight (..., groups, inputs, outputs) in its place."""
        front = weight.shape[:-3]
        order = [d for part in self.parts for d in part]
        lead = len(front) + len(self.stacks)
        core = weight.reshape(*front, *self.stacks, *(self.view.shape[d] for d in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        return self.view.pull(core.transpose(*range(lead), *(lead + d for d in back)))
