"""Places of the example axis, and the rules by which primitives move it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Entry i of axis ``dim`` belongs to example (i // inner) % count.

    Inside of scans a negative ``dim`` is a scan whose steps are the entries: -1 is the innermost.
    """

    dim: int
    inner: int = 1


class Mixed(NamedTuple):
    """Examples met at this primitive, or, where it is not ``ruled``, nothing is known of it."""

    primitive: str
    ruled: bool = True


AnyPlace = Place | Mixed | None


def join(a: AnyPlace, b: AnyPlace, primitive: str) -> AnyPlace:
    """The place of a value that reads ``a`` and ``b`` entry by entry."""
    if a is None or b is None or a == b:
        return b if a is None else a
    return next((p for p in (a, b) if isinstance(p, Mixed)), Mixed(primitive))


def reshaped(place: Place, old: Sequence[int], new: Sequence[int], count: int) -> Place | None:
    """The place after a row-major reshape; None where the axis is torn apart."""
    stride = place.inner * math.prod(old[place.dim + 1 :])
    below = 1
    for dim in reversed(range(len(new))):
        above = below * new[dim]
        if new[dim] > 1 and below <= stride < above:
            fits = stride % below == 0 and above % (stride * count) == 0
            return Place(dim, stride // below) if fits else None
        below = above
    return None if count > 1 or not len(new) else Place(0)


def reshape_order(eqn: Any) -> Sequence[int] | None:
    """The order that ``lax.reshape`` reads the axes of its operand in, where it is not theirs."""
    return eqn.params["dimensions"] if eqn.primitive.name == "reshape" else None


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


def _operand(eqn: Any, places: Sequence[AnyPlace]) -> Any:
    """Place and shape of the first operand, the only one that may read the batch; else None."""
    only_first = isinstance(places[0], Place) and all(place is None for place in places[1:])
    return (places[0] if only_first else None), eqn.invars[0].aval.shape


def _broadcast(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    return place and Place(eqn.params["broadcast_dimensions"][place.dim], place.inner)


def _reshape(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, shape = _operand(eqn, places)
    if place is not None and (order := reshape_order(eqn)) is not None:
        place = Place(tuple(order).index(place.dim), place.inner)
        shape = [shape[d] for d in order]
    return place and reshaped(place, shape, eqn.outvars[0].aval.shape, count)


def _transpose(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    return place and Place(eqn.params["permutation"].index(place.dim), place.inner)


def _reduce(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    axes = eqn.params["axes"]
    if place is None or place.dim in axes:
        return None
    return Place(place.dim - sum(axis < place.dim for axis in axes), place.inner)


def _stack(eqn: Any, places: Any, count: int) -> AnyPlace:
    """Operands of one shape along a new axis."""
    joined: AnyPlace = None
    for place in places:
        joined = join(joined, place, "stack")
    if not isinstance(joined, Place):
        return joined
    return Place(joined.dim + (eqn.params["axis"] <= joined.dim), joined.inner)


def _unstack(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    axis = eqn.params["axis"]
    if place is None or place.dim == axis:
        return None
    return Place(place.dim - (axis < place.dim), place.inner)


def _along(parameter: str) -> Any:
    """A primitive that mixes along one axis only; its array operands have one shape."""

    def rule(eqn: Any, places: Any, count: int) -> AnyPlace:
        joined: AnyPlace = None
        for place in places:
            joined = join(joined, place, eqn.primitive.name)
        keeps = isinstance(joined, Place) and joined.dim != eqn.params[parameter]
        return joined if keeps else None

    return rule


def _window(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    p = eqn.params
    if place is None:
        return None
    one = lambda key: p.get(key) is None or p[key][place.dim] == 1
    keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    return place if all(map(one, keys)) and tuple(p["padding"][place.dim]) == (0, 0) else None


def _slice(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, shape = _operand(eqn, places)
    if place is None or eqn.outvars[0].aval.shape[place.dim] != shape[place.dim]:
        return None
    return place


def _reverse(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    return None if place is None or place.dim in eqn.params["dimensions"] else place


def _pad(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    return None if place is None or any(eqn.params["padding_config"][place.dim]) else place


def _update_slice(eqn: Any, places: Any, count: int) -> AnyPlace:
    place = join(places[0], places[1], "dynamic_update_slice")
    if not isinstance(place, Place) or any(p is not None for p in places[2:]):
        return None
    whole = eqn.invars[0].aval.shape[place.dim] == eqn.invars[1].aval.shape[place.dim]
    return place if whole else None


def _dot_general(eqn: Any, places: Any, count: int) -> AnyPlace:
    contract, batch = eqn.params["dimension_numbers"]
    free: list[list[int]] = []
    for side, var in enumerate(eqn.invars):
        taken = (*contract[side], *batch[side])
        free.append([d for d in range(var.aval.ndim) if d not in taken])
    out: AnyPlace = None
    for side, place in enumerate(places):
        if place is None:
            continue
        if place.dim in batch[side]:
            dim = list(batch[side]).index(place.dim)
        elif place.dim in free[side]:
            dim = len(batch[0]) + side * len(free[0]) + free[side].index(place.dim)
        else:
            return None
        out = join(out, Place(dim, place.inner), "dot_general")
    return out


def _convolution(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, _ = _operand(eqn, places)
    numbers = eqn.params["dimension_numbers"]
    if place is None or place.dim != numbers.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        return None
    return Place(numbers.out_spec[0], place.inner)


def _gather(eqn: Any, places: Any, count: int) -> AnyPlace:
    operand, indices = places
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = eqn.outvars[0].aval.ndim
    batch_dims = [d for d in range(rank) if d not in numbers.offset_dims]
    out: AnyPlace = None
    if indices is not None:
        if indices.dim == eqn.invars[1].aval.ndim - 1:
            return None
        out = Place(batch_dims[indices.dim], indices.inner)
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
        out = join(out, Place(dim, operand.inner), "gather")
    return out


def _top_k(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, shape = _operand(eqn, places)
    axis = eqn.params.get("axis", len(shape) - 1) % len(shape)
    return None if place is None or place.dim == axis else place


def _scatter(eqn: Any, places: Any, count: int) -> AnyPlace:
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
        found = {place for place in places if place is not None}
        fits = all(p is None or p.dim == d for p, d in zip(places, expected, strict=True))
        if fits and len({place.inner for place in found}) == 1:
            return Place(dim, found.pop().inner)
    return None


def _leading(trailing: Any) -> Any:
    """A primitive of the last axes of its operands, ``trailing(eqn)`` of them, mapped over others.

    What it returns has the same leading axes.
    """

    def rule(eqn: Any, places: Any, count: int) -> AnyPlace:
        joined: AnyPlace = None
        for place, var in zip(places, eqn.invars, strict=True):
            if place is not None and place.dim >= var.aval.ndim - trailing(eqn):
                return None
            joined = join(joined, place, eqn.primitive.name)
        return joined if isinstance(joined, Place) else None

    return rule


def _triangular_solve(eqn: Any, places: Any, count: int) -> AnyPlace:
    """Right-hand sides of one matrix are independent of each other."""
    matrix, rhs = places
    free = eqn.invars[1].aval.ndim - (1 if eqn.params["left_side"] else 2)
    if matrix is None and rhs is not None and rhs.dim == free:
        return rhs
    return _leading(lambda eqn: 2)(eqn, places, count)


def _tile(eqn: Any, places: Any, count: int) -> AnyPlace:
    place, shape = _operand(eqn, places)
    if place is None or (eqn.params["reps"][place.dim] > 1 and shape[place.dim] % count):
        return None
    return place


def _keys(eqn: Any, places: Any, count: int) -> AnyPlace:
    """Random keys: what is drawn from each key stays at its place, with further axes behind."""
    joined: AnyPlace = None
    for place in places:
        joined = join(joined, place, eqn.primitive.name)
    return joined if isinstance(joined, Place) else None


RULES: dict[str, Any] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "stack": _stack,
    "unstack": _unstack,
    "sort": _along("dimension"),
    "concatenate": _along("dimension"),
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
