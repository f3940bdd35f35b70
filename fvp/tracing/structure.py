"""The primitives that rearrange a parameter: which view of it each makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fvp.tracing.batch_axis_rules import reshape_order
from fvp.tracing.parameter_views import View, Window, broadcast

_SAME = ("copy", "copy_p", "name", "pvary", "pcast", "sharding_constraint", "reshard")
_ROUNDED = ("convert_element_type", "reduce_precision")
_SUMS = ("add", "sub", "add_any")


def structural(eqn: Any, position: int, view: View, others: Sequence[Any]) -> list[View] | None:
    """The views that the outputs of ``eqn`` are of its operand number ``position``.

    None where it does more than rearrange. ``others`` are the other operands where they are
    constants, neither parameter nor batch, and None where they are not.
    """
    name, old = eqn.primitive.name, eqn.invars[position].aval.shape
    new = eqn.outvars[0].aval.shape
    if name in _SAME or name in _ROUNDED:
        return [view]
    if name in _RULES:
        return _RULES[name](eqn, position, view, old, new)
    if name == "neg":
        return [view.scaled(-1)]
    if name in _SUMS:
        view = view.scaled(-1) if name == "sub" and position == 1 else view
        return [view.spread(old, new)]
    if name == "mul" or (name == "div" and position == 0):
        return _multiplied(view, old, new, others[0], divide=name == "div")
    return None


def _reshape(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View] | None:
    if (order := reshape_order(eqn)) is not None:
        view, old = _permuted(view, order), tuple(old[d] for d in order)
    if view.pure:
        return [view.then(("reshape", old, new), new)]
    # Of a broadcast value: only axes of length one may come and go.
    kept = [(size, dim) for size, dim in zip(old, view.dims, strict=True) if size > 1]
    if [size for size, _ in kept] != [size for size in new if size > 1]:
        return None
    labels = iter(kept)
    dims = tuple(next(labels)[1] if size > 1 else None for size in new)
    return [dataclasses.replace(view, dims=dims)]


def _transpose(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View]:
    return [_permuted(view, eqn.params["permutation"])]


def _permuted(view: View, order: Sequence[int]) -> View:
    if view.pure:
        return view.then(("transpose", tuple(order)), tuple(view.shape[d] for d in order))
    return dataclasses.replace(view, dims=tuple(view.dims[d] for d in order))


def _broadcast(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View]:
    dims: list[int | None] = [None] * len(new)
    for source, target in enumerate(eqn.params["broadcast_dimensions"]):
        if old[source] == new[target]:
            dims[target] = view.dims[source]
    return [dataclasses.replace(view, dims=tuple(dims))]


def _slice(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(old)
    return [_cut(view, tuple(zip(p["start_indices"], p["limit_indices"], strides, strict=True)))]


def _reverse(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View]:
    back = eqn.params["dimensions"]
    return [_cut(view, tuple((None, None, -1 if d in back else 1) for d in range(len(old))))]


def _split(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View]:
    axis, start, parts = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        parts.append(_cut(view, _along(axis, len(old), (start, start + size, 1))))
        start += size
    return parts


def _unstack(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View] | None:
    axis, views = eqn.params["axis"], []
    for i in range(old[axis]):
        cut = _cut(view, _along(axis, len(old), (i, i + 1, 1)))
        if not cut.pure:
            return None
        views.append(cut.then(("reshape", cut.shape, new), new))
    return views


def _concatenate(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View] | None:
    axis = eqn.params["dimension"]
    start = sum(var.aval.shape[axis] for var in eqn.invars[:position])
    return _embedded(view, axis, old[axis], new[axis], (start, start + old[axis], 1))


def _stack(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View] | None:
    axis = eqn.params["axis"]
    dims = (*view.dims[:axis], None, *view.dims[axis:])
    view = dataclasses.replace(view, dims=dims)
    return _embedded(view, axis, 1, new[axis], (position, position + 1, 1))


def _pad(eqn: Any, position: int, view: View, old: Any, new: Any) -> list[View] | None:
    if position != 0:
        return None
    for axis, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        size, stride = int(old[axis]), int(interior) + 1
        if low < 0 or high < 0:
            return None
        window = (int(low), int(low) + (size - 1) * stride + 1, stride)
        embedded = _embedded(view, axis, size, new[axis], window)
        if embedded is None:
            return None
        (view,) = embedded
    return [view]


_RULES = {
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


def _along(axis: int, rank: int, bounds: Any) -> Window:
    """``bounds`` on one axis, everything on the others."""
    return tuple(bounds if d == axis else (0, None, 1) for d in range(rank))


def _cut(view: View, window: Window) -> View:
    """The part of the value in ``window``; along repeated axes there is nothing to cut."""
    core: list[Any] = [(0, None, 1)] * len(view.shape)
    for dim, bounds in zip(view.dims, window, strict=True):
        if dim is not None:
            core[dim] = bounds
    sizes = (len(range(*slice(*b).indices(n))) for b, n in zip(core, view.shape, strict=True))
    dims = view.dims
    cut = view.then(("slice", view.shape, tuple(core)), tuple(sizes))
    return dataclasses.replace(cut, dims=dims)


def _embedded(view: View, axis: int, old: int, new: int, bounds: Any) -> list[View] | None:
    """The value inside zeros that are ``new`` long on one axis, where it was ``old``."""
    if old == new:
        return [view]
    dims = view.dims
    if dims[axis] is None:
        if old > 1:
            return None  # entries of the core would be repeated in some places only
        shape = (*view.shape, 1)
        dims = (*dims[:axis], len(view.shape), *dims[axis + 1 :])
        view = view.then(("reshape", view.shape, shape), shape)
    core = dims[axis]
    assert core is not None
    shape = (*view.shape[:core], new, *view.shape[core + 1 :])
    op = ("embed", view.shape, shape, _along(core, len(shape), bounds))
    return [dataclasses.replace(view.then(op, shape), dims=dims)]


def _multiplied(view: View, old: Any, new: Any, by: Any, *, divide: bool) -> list[View] | None:
    """The value times, or divided by, a constant."""
    if by is None:
        return None
    view = view.spread(old, new)
    if jnp.ndim(by):
        axes = [dim for dim in view.dims if dim is not None]
        if axes != sorted(axes) or math.prod(new) != math.prod(view.shape):
            return None
        by = broadcast(by, new).reshape(view.shape)
    return [view.scaled(1 / by if divide else by)]
