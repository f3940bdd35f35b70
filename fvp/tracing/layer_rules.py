"""The layer rules: which primitives use a parameter as the weight of a layer, and how.

A new layer is one function here, that sets ``kind``, ``shared_axes``, ``features``, ``parts`` and
the two readers of a `ParameterUse`, and one line in `classify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.tracing.batch_axes import AxisInfo
from fvp.tracing.jaxprs import Equation, free_dimensions
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.steps import Reshape
from fvp.tracing.uses import ParameterUse


def classify(
    eqn: Equation, position: int, view: ParameterView, batch_axes: Sequence[AxisInfo]
) -> ParameterUse:
    """The use that ``eqn`` makes of its operand number ``position``; kind "other" without rule."""
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    use = ParameterUse("other", view, name, tuple(batch_axes), out.shape, dtype=out.dtype)
    if name in ("add", "sub", "add_any", "mul"):
        if name == "sub" and position == 1:
            use.view = view.scaled(-1)
        use.view = use.view.spread(eqn.invars[position].aval.shape, use.shape)
        return _elementwise(use, "scale" if name == "mul" else "shift")
    if view.factor is not None and jnp.ndim(view.factor):
        use.view = view.absorbed()
    if name == "dot_general":
        return _dense(eqn, position, use)
    if name == "conv_general_dilated" and position == 1:
        return _convolution(eqn, use)
    if name == "gather" and position == 0:
        return _lookup(eqn, use)
    return use


def shift(
    view: ParameterView, primitive: str, batch_axes: Sequence[AxisInfo], x: Array
) -> ParameterUse:
    """The use of a parameter as the value ``x``, with these batch axes: an addition to it."""
    use = ParameterUse("other", view, primitive, tuple(batch_axes), x.shape, dtype=x.dtype)
    return _elementwise(use, "shift")


def _sizes(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[d] for d in dims)


def _ordered(*parts: Sequence[int], merge: int) -> Callable[[Any], Any]:
    """Transposes to the concatenated ``parts`` and merges each of the last ``merge`` parts."""
    order = [d for part in parts for d in part]
    kept = sum(len(part) for part in parts[: len(parts) - merge])

    def apply(x: Any) -> Any:
        merged = [_sizes(x.shape, part) for part in parts[len(parts) - merge :]]
        x = x.transpose(order)
        return x.reshape(*x.shape[:kept], *merged)

    return apply


def _with_parts(use: ParameterUse, *parts: Sequence[Any]) -> ParameterUse:
    use.parts = tuple(tuple(part) for part in parts)
    return use


def _dense(eqn: Equation, position: int, use: ParameterUse) -> ParameterUse:
    view, other = use.view, 1 - position
    contract, batch = eqn.params["dimension_numbers"]
    if any(view.dims[d] is None for d in contract[position]):
        return use
    free = free_dimensions(eqn)
    if any(view.dims[d] is None for d in free[position]):
        return use
    # Along a batch dimension of the product a weight that is repeated is one weight, shared.
    is_group = [view.dims[d] is not None for d in batch[position]]
    group_out = tuple(i for i, grouped in enumerate(is_group) if grouped)
    shared_out = [i for i, grouped in enumerate(is_group) if not grouped]
    start = [len(is_group), len(is_group) + len(free[0])]
    shared_out += [start[other] + i for i in range(len(free[other]))]
    feature_out = tuple(start[position] + i for i in range(len(free[position])))
    x_shared = [batch[other][i] for i in range(len(is_group)) if not is_group[i]] + free[other]
    use.kind, use.shared_axes, use.features = "dense", tuple(shared_out), (*group_out, *feature_out)
    x_groups = [batch[other][i] for i in group_out]
    use.read_input = _ordered(x_shared, x_groups, contract[other], merge=2)
    use.read_output = _ordered(shared_out, group_out, feature_out, merge=2)
    core = lambda dims: [view.dims[d] for d in dims]
    groups = core(batch[position][i] for i in group_out)
    named = [*groups, *core(contract[position]), *core(free[position])]
    rest = [d for d in range(len(view.shape)) if d not in named]  # of length one
    return _with_parts(use, [*rest, *groups], core(contract[position]), core(free[position]))


def _convolution(eqn: Equation, use: ParameterUse) -> ParameterUse:
    p, view = eqn.params, use.view
    if not view.pure or p["batch_group_count"] != 1:
        return use
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    out_dim, in_dim, *spatial = numbers.rhs_spec
    window = [view.shape[d] for d in spatial]
    out_features, in_features = view.shape[out_dim], view.shape[in_dim]

    def read_input(x: Array) -> Array:
        # Patches come with the channels slowest: (batch, channels x window, positions).
        x = x.transpose(numbers.lhs_spec)
        patches = jax.lax.conv_general_dilated_patches(
            x,
            window,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )
        patches = jnp.moveaxis(patches, 1, -1)
        return patches.reshape(*patches.shape[:-1], groups, in_features * math.prod(window))

    def read_output(y: Array) -> Array:
        y = jnp.moveaxis(y.transpose(numbers.out_spec), 1, -1)
        return y.reshape(*y.shape[:-1], groups, out_features // groups)

    use.kind, use.read_input, use.read_output = "convolution", read_input, read_output
    use.shared_axes = (numbers.out_spec[0], *numbers.out_spec[2:])
    use.features = (numbers.out_spec[1],)
    # The output channels come group by group.
    old = view.shape
    new = (*old[:out_dim], groups, out_features // groups, *old[out_dim + 1 :])
    use.view = view.then(Reshape(old, new), new)
    after = lambda d: d + (d > out_dim)
    inputs = [after(in_dim), *map(after, spatial)]
    return _with_parts(use, [out_dim], inputs, [out_dim + 1])


def _lookup(eqn: Equation, use: ParameterUse) -> ParameterUse:
    numbers, view = eqn.params["dimension_numbers"], use.view
    axes, shape = numbers.start_index_map, eqn.invars[0].aval.shape
    whole = tuple(1 if d in axes else size for d, size in enumerate(shape))
    if (
        not view.pure
        or not axes
        or sorted(numbers.collapsed_slice_dims) != sorted(axes)
        or numbers.operand_batching_dims
        or eqn.params["slice_sizes"] != whole
    ):
        return use
    clip = "CLIP" in str(eqn.params["mode"])
    sizes = np.array([shape[axis] for axis in axes])

    def read_input(indices: Array) -> Array:
        """Numbers of inputs; one past the last where an index is out of range, to read none."""
        indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
        if clip:
            indices = jnp.clip(indices, 0, sizes - 1)
        inside = jnp.all((indices >= 0) & (indices < sizes), axis=-1)
        number = sum(indices[..., i] * math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
        return jnp.where(inside, number, math.prod(sizes))[..., None]

    rest = [d for d in range(len(shape)) if d not in axes]
    use.kind, use.read_input, use.features = "lookup", read_input, numbers.offset_dims
    use.shared_axes = tuple(d for d in range(len(use.shape)) if d not in numbers.offset_dims)
    use.read_output = _ordered(use.shared_axes, (), numbers.offset_dims, merge=2)
    return _with_parts(use, (), axes, rest)


def _elementwise(use: ParameterUse, kind: str) -> ParameterUse:
    view, shape = use.view, use.shape
    found = [d for d, dim in enumerate(view.dims) if dim is not None]
    found.sort(key=lambda d: view.dims[d])  # pyright: ignore[reportArgumentType, reportCallIssue]
    named = [view.dims[d] for d in found]
    if any(size > 1 for d, size in enumerate(view.shape) if d not in named):
        return use
    groups, outputs = found[:-1], found[-1:]
    use.kind, use.features = kind, tuple(found)
    use.shared_axes = tuple(d for d in range(len(use.shape)) if d not in found)
    use.read_input = lambda x: jnp.broadcast_to(x, shape)
    use.read_output = _ordered(use.shared_axes, groups, outputs, merge=2)
    last = named[-1:] if named else []
    rest = [d for d in range(len(view.shape)) if d not in last]
    return _with_parts(use, rest, (), last)
