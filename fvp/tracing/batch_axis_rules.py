"""How the primitives of JAX move a batch axis.

A rule takes an equation, what is known of one batch axis in each of its operands (never all None,
none `Mixed`), and the length of that axis. It returns what is known of it in the outputs, or
None where the primitive mixes examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fvp.tracing.batch_axes import AxisInfo, BatchAxis, Part, join, join_all, reshaped
from fvp.tracing.jaxprs import Equation, free_dimensions, reshape_order

Axes: TypeAlias = Sequence[Any]  # BatchAxis or None, which each rule tells apart as it needs
Rule: TypeAlias = Callable[[Equation, Axes, int], AxisInfo]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos
    cosh device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite layout_constraint le le_to lgamma log
    log1p log2 logistic lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square
    optimization_barrier or pcast polygamma polynomial population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh
    sqrt square stop_gradient sub tan tanh threefry2x32 threefry4x32 xor zeta"""
)
_REDUCTIONS = _names(
    """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"""
)
_CUMULATIVE = _names("cumsum cumprod cummax cummin cumlogsumexp")
_KEYS = _names(
    "random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap"
    " random_wrap"
)
_MATRICES = _names("cholesky eig eigh householder_product lu qr schur svd tridiagonal")
_SCATTERS = _names("scatter scatter-add scatter_add scatter_mul scatter_min scatter_max")
_WINDOWS = _names(
    """reduce_window reduce_window_sum reduce_window_max reduce_window_min reduce_window_prod"""
)


def _operand(eqn: Equation, axes: Sequence[AxisInfo]) -> tuple[Any, Sequence[int]]:
    """Batch axis of the first operand, None unless it alone reads the batch; and its shape."""
    only_first = isinstance(axes[0], BatchAxis) and all(batch is None for batch in axes[1:])
    return (axes[0] if only_first else None), eqn.invars[0].aval.shape


def _broadcast(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    return batch and batch.at(eqn.params["broadcast_dimensions"][batch.dim])


def _reshape(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, shape = _operand(eqn, axes)
    if batch is not None and (order := reshape_order(eqn)) is not None:
        batch = batch.at(tuple(order).index(batch.dim))
        shape = [shape[d] for d in order]
    return batch and reshaped(batch, shape, eqn.outvars[0].aval.shape, count)


def _transpose(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    return batch and batch.at(eqn.params["permutation"].index(batch.dim))


def _reduce(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    reduced = eqn.params["axes"]
    if batch is None or batch.dim in reduced:
        return None
    return batch.at(batch.dim - sum(dim < batch.dim for dim in reduced))


def _stack(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Operands of one shape along a new axis."""
    joined = join_all(axes, "stack")
    if not isinstance(joined, BatchAxis):
        return joined
    return joined.at(joined.dim + (eqn.params["axis"] <= joined.dim))


def _unstack(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    axis = eqn.params["axis"]
    if batch is None or batch.dim == axis:
        return None
    return batch.at(batch.dim - (axis < batch.dim))


def _along(parameter: str) -> Rule:
    """A primitive that mixes along one axis only; its array operands have one shape."""

    def rule(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
        joined = join_all(axes, eqn.primitive.name)
        keeps = isinstance(joined, BatchAxis) and joined.dim != eqn.params[parameter]
        return joined if keeps else None

    return rule


def _window(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    p = eqn.params
    if batch is None:
        return None
    one = lambda key: p.get(key) is None or p[key][batch.dim] == 1
    keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    return batch if all(map(one, keys)) and tuple(p["padding"][batch.dim]) == (0, 0) else None


def _concatenate(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Along another axis, or of parts of the batch that follow each other."""
    dim = eqn.params["dimension"]
    sizes = [var.aval.shape[dim] for var in eqn.invars]
    starts: set[int] = set()
    for i, (batch, size) in enumerate(zip(axes, sizes, strict=True)):
        if batch is None:
            continue
        part = batch.stretch(count)
        if batch != BatchAxis(dim, 1, batch.part) or part.length != size:
            return _along("dimension")(eqn, axes, count)
        starts.add(part.start - sum(sizes[:i]))
    part = Part(starts.pop(), sum(sizes))
    return None if starts else BatchAxis(dim).of(part, count)


def in_operand(eqn: Equation, position: int, batch: AxisInfo, count: int) -> AxisInfo:
    """The batch axis in one operand, from that in the output: a part of it in a concatenation."""
    dim = eqn.params.get("dimension")
    if eqn.primitive.name != "concatenate" or not isinstance(batch, BatchAxis) or batch.dim != dim:
        return batch
    sizes = [var.aval.shape[dim] for var in eqn.invars]
    start = batch.stretch(count).start + sum(sizes[:position])
    return batch.of(Part(start, sizes[position]), count)


def _slice(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Whole batch axes, and consecutive examples."""
    batch, shape = _operand(eqn, axes)
    if batch is None:
        return None
    dim, length = batch.dim, eqn.outvars[0].aval.shape[batch.dim]
    if length == shape[dim]:
        return batch
    strides = eqn.params.get("strides")
    consecutive = eqn.primitive.name == "slice" and (strides is None or strides[dim] == 1)
    part = batch.stretch(count)
    if not consecutive or (batch.inner, part.length) != (1, shape[dim]):
        return None
    return batch.of(Part(part.start + eqn.params["start_indices"][dim], length), count)


def _reverse(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    return None if batch is None or batch.dim in eqn.params["dimensions"] else batch


def _pad(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Whole batch axes, and parts among entries that are no example's."""
    batch, shape = _operand(eqn, axes)
    if batch is None or not any(eqn.params["padding_config"][batch.dim]):
        return batch
    low, high, interior = eqn.params["padding_config"][batch.dim]
    part, size = batch.stretch(count), shape[batch.dim]
    if interior or min(low, high) < 0 or (batch.inner, part.length) != (1, size):
        return None
    return batch.of(Part(part.start - low, low + size + high), count)


def _update_slice(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch = join(axes[0], axes[1], "dynamic_update_slice")
    if not isinstance(batch, BatchAxis) or any(p is not None for p in axes[2:]):
        return None
    whole = eqn.invars[0].aval.shape[batch.dim] == eqn.invars[1].aval.shape[batch.dim]
    return batch if whole else None


def _dot_general(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    _, paired = eqn.params["dimension_numbers"]
    free = free_dimensions(eqn)
    out: AxisInfo = None
    for side, batch in enumerate(axes):
        if batch is None:
            continue
        if batch.dim in paired[side]:
            dim = list(paired[side]).index(batch.dim)
        elif batch.dim in free[side]:
            dim = len(paired[0]) + side * len(free[0]) + free[side].index(batch.dim)
        else:
            return None
        out = join(out, batch.at(dim), "dot_general")
    return out


def _convolution(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, _ = _operand(eqn, axes)
    numbers = eqn.params["dimension_numbers"]
    if batch is None or batch.dim != numbers.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        return None
    return batch.at(numbers.out_spec[0])


def _gather(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    operand, indices = axes
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = eqn.outvars[0].aval.ndim
    batch_dims = [d for d in range(rank) if d not in numbers.offset_dims]
    out: AxisInfo = None
    if indices is not None:
        if indices.dim == eqn.invars[1].aval.ndim - 1:
            return None
        out = indices.at(batch_dims[indices.dim])
    if operand is not None:
        if operand.dim in numbers.operand_batching_dims:
            position = numbers.operand_batching_dims.index(operand.dim)
            dim = batch_dims[numbers.start_indices_batching_dims[position]]
        else:
            dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            kept = [d for d in range(eqn.invars[0].aval.ndim) if d not in dropped]
            whole = sizes[operand.dim] == eqn.invars[0].aval.shape[operand.dim]
            if operand.dim not in kept or not whole:
                return None
            dim = numbers.offset_dims[kept.index(operand.dim)]
        out = join(out, operand.at(dim), "gather")
    return out


def _top_k(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, shape = _operand(eqn, axes)
    axis = eqn.params.get("axis", len(shape) - 1) % len(shape)
    return None if batch is None or batch.dim == axis else batch


def _scatter(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Updates of whole axes, and of each entry of a batching axis by its own."""
    numbers, (operand, _, updates) = eqn.params["dimension_numbers"], eqn.invars
    inserted, batching = numbers.inserted_window_dims, numbers.operand_batching_dims
    window = [d for d in range(operand.aval.ndim) if d not in (*inserted, *batching)]
    in_updates = dict(zip(window, numbers.update_window_dims, strict=True))
    rest = [d for d in range(updates.aval.ndim) if d not in numbers.update_window_dims]
    for dim, size in enumerate(operand.aval.shape):
        if dim in batching:
            index = numbers.scatter_indices_batching_dims[batching.index(dim)]
            expected = (dim, index, rest[index])
        elif dim in in_updates and updates.aval.shape[in_updates[dim]] == size:
            expected = (dim, None, in_updates[dim])
        else:
            continue
        found = {batch.at(dim) for batch in axes if batch is not None}
        fits = all(p is None or p.dim == d for p, d in zip(axes, expected, strict=True))
        if fits and len(found) == 1:
            return found.pop()
    return None


def _leading(trailing: Callable[[Equation], int]) -> Rule:
    """A primitive of the last axes of its operands, ``trailing(eqn)`` of them, mapped over others.

    What it returns has the same leading axes.
    """

    def rule(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
        joined: AxisInfo = None
        for batch, var in zip(axes, eqn.invars, strict=True):
            if batch is not None and batch.dim >= var.aval.ndim - trailing(eqn):
                return None
            joined = join(joined, batch, eqn.primitive.name)
        return joined if isinstance(joined, BatchAxis) else None

    return rule


def _triangular_solve(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Right-hand sides of one matrix are independent of each other."""
    matrix, rhs = axes
    free = eqn.invars[1].aval.ndim - (1 if eqn.params["left_side"] else 2)
    if matrix is None and rhs is not None and rhs.dim == free:
        return rhs
    return _leading(lambda eqn: 2)(eqn, axes, count)


def _tile(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    batch, shape = _operand(eqn, axes)
    if batch is None or (
        eqn.params["reps"][batch.dim] > 1 and shape[batch.dim] % batch.stretch(count).length
    ):
        return None
    return batch


def _keys(eqn: Equation, axes: Axes, count: int) -> AxisInfo:
    """Random keys: what is drawn from each key stays where it is, with further axes behind."""
    joined = join_all(axes, eqn.primitive.name)
    return joined if isinstance(joined, BatchAxis) else None


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "stack": _stack,
    "unstack": _unstack,
    "sort": _along("dimension"),
    "concatenate": _concatenate,
    "split": _along("axis"),
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _update_slice,
    "rev": _reverse,
    "pad": _pad,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "top_k": _top_k,
    "tile": _tile,
    "fft": _leading(lambda eqn: len(eqn.params["fft_lengths"])),
    "lu_pivots_to_permutation": _leading(lambda eqn: 1),
}
RULES |= dict.fromkeys(_MATRICES, _leading(lambda eqn: 2))
RULES["triangular_solve"] = _triangular_solve
RULES |= dict.fromkeys(_SCATTERS, _scatter)
RULES |= dict.fromkeys(_REDUCTIONS, _reduce)
RULES |= dict.fromkeys(_CUMULATIVE, _along("axis"))
RULES |= dict.fromkeys(_WINDOWS, _window)
RULES |= dict.fromkeys(_KEYS, _keys)
