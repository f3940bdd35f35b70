"""The uses of a parameter that have a layer rule, in one canonical layout.

A use multiplies a weight W of shape (groups, inputs, outputs) with rows of inputs: the gradient of
anything is sum over rows of input x output-cotangent, group by group. Dense layers, convolutions
(on patches) and lookups (of one-hot rows) are of this kind; shifts and scales are it with a single
input of one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.tracing.batch_axis_rules import AnyPlace
from fvp.tracing.layouts import Layout
from fvp.tracing.parameter_views import View


@dataclasses.dataclass(eq=False)
class Use:
    """One use of one view of a parameter.

    Attributes:
      kind: "dense", "convolution", "lookup", "shift" or "scale"; without a rule "other", or, of a
        parameter that is part of the weight, "partial" or "nothing".
      view: the parameter on its way here.
      primitive: name of the JAX primitive.
      places: of the output, one for each batch axis.
      shape: of the output, inside any scan; ``dtype`` likewise.
      rows: the axes of the output that are rows.
      read_input: the other operand -> (rows, groups, inputs); indices (rows, groups) of a lookup;
        factors in the shape of the output for a scale.
      read_output: an array like the output -> (rows, groups, outputs).
      parts: the axes of the core that are (groups, inputs, outputs).
      features: the axes of the output that are (groups, outputs), in this order.
      scans: the lengths of the enclosing scans, outermost first, and whether each scans over the
        parameter ("stacked") or shares it.
      joined: for a shift, the use whose output it shifts, where nothing else reads that.
      kept: the groups, inputs and outputs that are this parameter's, where others are not.
    """

    kind: str
    view: View
    primitive: str
    places: tuple[AnyPlace, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    read_input: Callable[[Any], Any] = lambda x: x
    read_output: Callable[[Any], Any] = lambda x: x
    parts: tuple[tuple[int, ...], ...] = ((), (), ())
    features: tuple[int, ...] = ()
    scans: tuple[tuple[str, int], ...] = ()
    joined: Use | None = None
    dtype: Any = None
    kept: tuple[tuple[int, ...], ...] | None = None

    @property
    def layout(self) -> Layout:
        """How the parameter is the weight (groups, inputs, outputs) of this use."""
        return Layout(dataclasses.replace(self.view, factor=None), self.parts, self.kept)

    @property
    def embedded(self) -> bool:
        """Whether the weight is more than this parameter."""
        return any(op[0] == "embed" for op in self.view.ops)


def classify(eqn: Any, position: int, view: View, places: Sequence[AnyPlace]) -> Use:
    """The use that ``eqn`` makes of its operand number ``position``; kind "other" without rule."""
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    use = Use("other", view, name, tuple(places), out.shape, dtype=out.dtype)
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


def shift(view: View, primitive: str, places: Sequence[AnyPlace], x: Array) -> Use:
    """The use of a value that is ``x``, at ``places``, as data: an addition to it."""
    use = Use("other", view, primitive, tuple(places), x.shape, dtype=x.dtype)
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


def _with_parts(use: Use, *parts: Sequence[Any]) -> Use:
    use.parts = tuple(tuple(part) for part in parts)
    return use


def _dense(eqn: Any, position: int, use: Use) -> Use:
    view, other = use.view, 1 - position
    contract, batch = eqn.params["dimension_numbers"]
    if any(view.dims[d] is None for d in contract[position]):
        return use
    free: list[list[int]] = []
    for side, var in enumerate(eqn.invars):
        taken = (*contract[side], *batch[side])
        free.append([d for d in range(var.aval.ndim) if d not in taken])
    if any(view.dims[d] is None for d in free[position]):
        return use
    # A batch axis along which the weight is repeated is a row axis of the other operand.
    is_group = [view.dims[d] is not None for d in batch[position]]
    group_out = tuple(i for i, grouped in enumerate(is_group) if grouped)
    row_out = [i for i, grouped in enumerate(is_group) if not grouped]
    start = [len(is_group), len(is_group) + len(free[0])]
    row_out += [start[other] + i for i in range(len(free[other]))]
    feature_out = tuple(start[position] + i for i in range(len(free[position])))
    x_rows = [batch[other][i] for i in range(len(is_group)) if not is_group[i]] + free[other]
    use.kind, use.rows, use.features = "dense", tuple(row_out), (*group_out, *feature_out)
    x_groups = [batch[other][i] for i in group_out]
    use.read_input = _ordered(x_rows, x_groups, contract[other], merge=2)
    use.read_output = _ordered(row_out, group_out, feature_out, merge=2)
    core = lambda dims: [view.dims[d] for d in dims]
    groups = core(batch[position][i] for i in group_out)
    named = [*groups, *core(contract[position]), *core(free[position])]
    rest = [d for d in range(len(view.shape)) if d not in named]  # of length one
    return _with_parts(use, [*rest, *groups], core(contract[position]), core(free[position]))


def _convolution(eqn: Any, use: Use) -> Use:
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
    use.rows = (numbers.out_spec[0], *numbers.out_spec[2:])
    use.features = (numbers.out_spec[1],)
    # The output channels come group by group.
    old = view.shape
    new = (*old[:out_dim], groups, out_features // groups, *old[out_dim + 1 :])
    use.view = view.then(("reshape", old, new), new)
    after = lambda d: d + (d > out_dim)
    inputs = [after(in_dim), *map(after, spatial)]
    return _with_parts(use, [out_dim], inputs, [out_dim + 1])


def _lookup(eqn: Any, use: Use) -> Use:
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
        """Row numbers; one past the last where an index is out of range and nothing is read."""
        indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
        if clip:
            indices = jnp.clip(indices, 0, sizes - 1)
        inside = jnp.all((indices >= 0) & (indices < sizes), axis=-1)
        rows = sum(indices[..., i] * math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
        return jnp.where(inside, rows, math.prod(sizes))[..., None]

    rest = [d for d in range(len(shape)) if d not in axes]
    use.kind, use.read_input, use.features = "lookup", read_input, numbers.offset_dims
    use.rows = tuple(d for d in range(len(use.shape)) if d not in numbers.offset_dims)
    use.read_output = _ordered(use.rows, (), numbers.offset_dims, merge=2)
    return _with_parts(use, (), axes, rest)


def _elementwise(use: Use, kind: str) -> Use:
    view, shape = use.view, use.shape
    found = [d for d, dim in enumerate(view.dims) if dim is not None]
    found.sort(key=lambda d: view.dims[d])  # pyright: ignore[reportArgumentType, reportCallIssue]
    named = [view.dims[d] for d in found]
    if any(size > 1 for d, size in enumerate(view.shape) if d not in named):
        return use
    groups, outputs = found[:-1], found[-1:]
    use.kind, use.features = kind, tuple(found)
    use.rows = tuple(d for d in range(len(use.shape)) if d not in found)
    use.read_input = lambda x: jnp.broadcast_to(x, shape)
    use.read_output = _ordered(use.rows, groups, outputs, merge=2)
    last = named[-1:] if named else []
    rest = [d for d in range(len(view.shape)) if d not in last]
    return _with_parts(use, rest, (), last)
