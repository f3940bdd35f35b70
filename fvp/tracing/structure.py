"""The primitives that rearrange a parameter: which view of it each makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from fvp.tracing.jaxprs import Equation, reshape_order
from fvp.tracing.parameter_views import ParameterView, broadcast
from fvp.tracing.steps import Bounds, Embed, Permute, Reshape, Shape, Slice, Window

Views: TypeAlias = list[ParameterView] | None  # one for each output, or None: no rearrangement

_SAME = ("copy", "copy_p", "name", "pvary", "pcast", "sharding_constraint", "reshard")
_ROUNDED = ("convert_element_type", "reduce_precision")
_SUMS = ("add", "sub", "add_any")


@dataclasses.dataclass(frozen=True)
class Operand:
    """Operand number ``position`` of an equation, of which ``view`` is known."""

    eqn: Equation
    position: int
    view: ParameterView

    @property
    def old(self) -> Shape:
        """Its shape."""
        return self.eqn.invars[self.position].aval.shape

    @property
    def new(self) -> Shape:
        """The shape of the first output."""
        return self.eqn.outvars[0].aval.shape


def structural(operand: Operand, others: Sequence[Any]) -> Views:
    """The views that the outputs of an equation are of ``operand``.

    None where it does more than rearrange. ``others`` are the other operands where they are
    constants, neither parameter nor batch, and None where they are not.
    """
    name, view = operand.eqn.primitive.name, operand.view
    if name in _SAME or name in _ROUNDED:
        return [view]
    if name in _RULES:
        return _RULES[name](operand)
    if name == "neg":
        return [view.scaled(-1)]
    if name in _SUMS:
        view = view.scaled(-1) if name == "sub" and operand.position == 1 else view
        return [view.spread(operand.old, operand.new)]
    if name == "mul" or (name == "div" and operand.position == 0):
        return _multiplied(operand, others[0], divide=name == "div")
    return None


def _reshape(operand: Operand) -> Views:
    view, old, new = operand.view, operand.old, operand.new
    if (order := reshape_order(operand.eqn)) is not None:
        view, old = _permuted(view, order), tuple(old[d] for d in order)
    if view.pure:
        return [view.then(Reshape(old, new), new)]
    # Of a broadcast value: only axes of length one may come and go.
    kept = [(size, dim) for size, dim in zip(old, view.dims, strict=True) if size > 1]
    if [size for size, _ in kept] != [size for size in new if size > 1]:
        return None
    labels = iter(kept)
    dims = tuple(next(labels)[1] if size > 1 else None for size in new)
    return [dataclasses.replace(view, dims=dims)]


def _transpose(operand: Operand) -> Views:
    return [_permuted(operand.view, operand.eqn.params["permutation"])]


def _permuted(view: ParameterView, order: Sequence[int]) -> ParameterView:
    if view.pure:
        return view.then(Permute(tuple(order)), tuple(view.shape[d] for d in order))
    return dataclasses.replace(view, dims=tuple(view.dims[d] for d in order))


def _broadcast(operand: Operand) -> Views:
    dims: list[int | None] = [None] * len(operand.new)
    for source, target in enumerate(operand.eqn.params["broadcast_dimensions"]):
        if operand.old[source] == operand.new[target]:
            dims[target] = operand.view.dims[source]
    return [dataclasses.replace(operand.view, dims=tuple(dims))]


def _slice(operand: Operand) -> Views:
    p = operand.eqn.params
    strides = p["strides"] or (1,) * len(operand.old)
    window = tuple(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    return [_cut(operand.view, window)]


def _reverse(operand: Operand) -> Views:
    back = operand.eqn.params["dimensions"]
    steps = [-1 if d in back else 1 for d in range(len(operand.old))]
    return [_cut(operand.view, tuple((None, None, step) for step in steps))]


def _split(operand: Operand) -> Views:
    axis, start, parts = operand.eqn.params["axis"], 0, []
    for size in map(int, operand.eqn.params["sizes"]):
        window = _along(axis, len(operand.old), (start, start + size, 1))
        parts.append(_cut(operand.view, window))
        start += size
    return parts


def _unstack(operand: Operand) -> Views:
    axis, views = operand.eqn.params["axis"], []
    for i in range(operand.old[axis]):
        cut = _cut(operand.view, _along(axis, len(operand.old), (i, i + 1, 1)))
        if not cut.pure:
            return None
        views.append(cut.then(Reshape(cut.shape, operand.new), operand.new))
    return views


def _concatenate(operand: Operand) -> Views:
    axis = operand.eqn.params["dimension"]
    start = sum(var.aval.shape[axis] for var in operand.eqn.invars[: operand.position])
    old, new = operand.old[axis], operand.new[axis]
    return _one(_embedded(operand.view, axis, old, new, (start, start + old, 1)))


def _stack(operand: Operand) -> Views:
    axis, view, position = operand.eqn.params["axis"], operand.view, operand.position
    dims = (*view.dims[:axis], None, *view.dims[axis:])
    view = dataclasses.replace(view, dims=dims)
    return _one(_embedded(view, axis, 1, operand.new[axis], (position, position + 1, 1)))


def _pad(operand: Operand) -> Views:
    if operand.position != 0:
        return None
    view: ParameterView | None = operand.view
    for axis, (low, high, interior) in enumerate(operand.eqn.params["padding_config"]):
        size, stride = int(operand.old[axis]), int(interior) + 1
        if low < 0 or high < 0 or view is None:
            return None
        window = (int(low), int(low) + (size - 1) * stride + 1, stride)
        view = _embedded(view, axis, size, operand.new[axis], window)
    return _one(view)


_RULES: dict[str, Callable[[Operand], Views]] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _reverse,
    "split": _split,
    "unstack": _unstack,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
}


def _one(view: ParameterView | None) -> Views:
    return None if view is None else [view]


def _along(axis: int, rank: int, bounds: Bounds) -> Window:
    """``bounds`` on one axis, everything on the others."""
    return tuple(bounds if d == axis else (0, None, 1) for d in range(rank))


def _cut(view: ParameterView, window: Window) -> ParameterView:
    """The part of the value in ``window``; along repeated axes there is nothing to cut."""
    core: list[Bounds] = [(0, None, 1)] * len(view.shape)
    for dim, bounds in zip(view.dims, window, strict=True):
        if dim is not None:
            core[dim] = bounds
    sizes = (len(range(*slice(*b).indices(n))) for b, n in zip(core, view.shape, strict=True))
    dims = view.dims
    cut = view.then(Slice(view.shape, tuple(core)), tuple(sizes))
    return dataclasses.replace(cut, dims=dims)


def _embedded(
    view: ParameterView, axis: int, old: int, new: int, bounds: Bounds
) -> ParameterView | None:
    """The value inside zeros that are ``new`` long on one axis, where it was ``old``.

    None where entries of the core would be repeated, but not along the whole axis.
    """
    if old == new:
        return view
    dims = view.dims
    if dims[axis] is None:
        if old > 1:
            return None
        shape = (*view.shape, 1)
        dims = (*dims[:axis], len(view.shape), *dims[axis + 1 :])
        view = view.then(Reshape(view.shape, shape), shape)
    core = dims[axis]
    assert core is not None
    shape = (*view.shape[:core], new, *view.shape[core + 1 :])
    embed = Embed(shape, _along(core, len(shape), bounds))
    return dataclasses.replace(view.then(embed, shape), dims=dims)


def _multiplied(operand: Operand, by: Any, *, divide: bool) -> Views:
    """The value times, or divided by, a constant."""
    if by is None:
        return None
    new, view = operand.new, operand.view.spread(operand.old, operand.new)
    if jnp.ndim(by):
        axes = [dim for dim in view.dims if dim is not None]
        if axes != sorted(axes) or math.prod(new) != math.prod(view.shape):
            return None
        by = broadcast(by, new).reshape(view.shape)
    return [view.scaled(1 / by if divide else by)]
