"""Dtypes and inner products that every layer of the library uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.compatibility import SUMS_SLOWLY
from fvp.typing import PyTree


def wide_dtype(dtype: DTypeLike) -> Any:
    """The dtype to compute in: float32, or ``dtype`` itself where it is wider."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widen(x: Array) -> Array:
    """``x`` in float32 or wider."""
    return jnp.asarray(x).astype(wide_dtype(x.dtype))


def widen_tree(tree: PyTree) -> PyTree:
    """Every leaf in float32 or wider."""
    return jax.tree.map(widen, tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves of ``tree`` in the dtypes of the leaves of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def power_of_two(x: Array) -> Array:
    """2^e next below the positive scalar ``x``; 1 where that is zero or not finite."""
    usable = jnp.isfinite(x) & (x > 0)
    _, exponent = jnp.frexp(jnp.where(usable, x, 1))
    return jnp.ldexp(jnp.ones((), x.dtype), exponent - 1)


def computed_once(x: PyTree) -> Any:
    """Arrays ``x`` that many others are computed from, such as a scalar that every leaf reads.

    XLA would compute each anew in every loop that reads it. For a scalar that is a sum over all
    leaves the program then grows with the square of their number, and compiles as slowly.
    """
    return jax.lax.optimization_barrier(x)


def in_order(result: PyTree, read: PyTree) -> Any:
    """A ``result``, and what it was ``read`` from, free to be overwritten.

    Where a branch reads an array and returns it, or another in its place, XLA does not see in which
    order, and copies it in all branches. With the arrays that come out here it does.
    """
    return jax.lax.optimization_barrier((result, read))


def tree_vdot(a: PyTree, b: PyTree) -> Array:
    """Inner product of two trees, accumulated in float32 or wider.

    Not by ``jnp.vdot``: that flattens its arguments, which a leaf that is sharded over an explicit
    mesh refuses, and it accumulates bfloat16 in bfloat16.
    """
    products = jax.tree.map(lambda x, y: _inner(widen(x), widen(y)), a, b)
    return computed_once(sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32)))


def sum_entries(x: Array) -> Array:
    """The sum of all entries; where XLA sums slowly and it can, by products with ones.

    Those run in vector registers, four times as fast as a sum in the order of the entries.
    """
    while not _fits_one_kernel(x) and _has_long_rows(x):
        x = _contract(x, jnp.ones(x.shape[-1:], x.dtype), (x.ndim - 1,))
    return _inner(x, jnp.ones_like(x)) if _fits_one_kernel(x) else jnp.sum(x)


def _inner(x: Array, y: Array) -> Array:
    if _fits_one_kernel(x) and _fits_one_kernel(y):
        return _contract(x, y, tuple(range(x.ndim)))
    return sum_entries(x * y)


def _contract(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
    """``x`` times ``y``, summed over ``axes`` of x and all of y."""
    dimensions = ((axes, tuple(range(y.ndim))), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, jax.lax.Precision.HIGHEST)


def _fits_one_kernel(x: Array) -> bool:
    """Whether XLA makes an inner product on CPU one kernel, and one of vector instructions."""
    small = x.size * x.dtype.itemsize < 2**14
    return _sums_slowly() and small and all(_is_whole(x, axis) for axis in range(x.ndim))


def _has_long_rows(x: Array) -> bool:
    """Whether matrix-vector products are what XLA does best with them."""
    return _sums_slowly() and x.ndim >= 2 and x.shape[-1] >= 32 and _is_whole(x, x.ndim - 1)


def _sums_slowly() -> bool:
    return SUMS_SLOWLY and jax.default_backend() == "cpu"


def _is_whole(x: Array, axis: int) -> bool:
    """Whether no Explicit mesh axis splits this one."""
    spec = getattr(jax.typeof(x).sharding, "spec", None)
    return not spec or len(spec) <= axis or spec[axis] is None


def tree_scale(scale: ArrayLike, x: PyTree) -> PyTree:
    """``scale * x``, leaf by leaf, in the dtypes of ``x``."""
    factor = computed_once(jnp.asarray(scale))
    times = lambda wide: factor.astype(wide.dtype) * wide
    return jax.tree.map(lambda leaf: times(widen(leaf)).astype(leaf.dtype), x)


def tree_axpy(scale: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """``scale * x + y``, leaf by leaf, in the dtypes of ``y``."""
    factor = computed_once(jnp.asarray(scale))
    return jax.tree.map(lambda a, b: (factor.astype(a.dtype) * a + b).astype(b.dtype), x, y)


def tree_where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """``a`` where ``condition`` (a scalar) holds, else ``b``."""
    condition = computed_once(condition)
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def tree_zeros_like(tree: PyTree) -> PyTree:
    """Zeros with the shapes, dtypes and shardings of ``tree``."""
    return jax.tree.map(jnp.zeros_like, tree)


def zeros_of(shapes: PyTree) -> PyTree:
    """Zeros for a tree of shapes, dtypes and shardings, such as ``jax.eval_shape`` returns."""
    return jax.tree.map(jnp.zeros_like, shapes)


def scan_sum(function: Callable[[Any], Any], xs: PyTree) -> PyTree:
    """The sum of the trees ``function(x)`` over the slices x of ``xs`` along its first axis.

    One slice at a time, so that memory is that of one result and not of all.
    """
    first = lambda xs: function(jax.tree.map(lambda x: x[0], xs))
    zeros = zeros_of(jax.eval_shape(first, xs))
    step = lambda total, x: (jax.tree.map(jnp.add, total, function(x)), None)
    return jax.lax.scan(step, zeros, xs)[0]


def tree_norm(tree: PyTree) -> Array:
    """Euclidean norm, also where the squares would leave the range of floats."""
    leaves = [widen(leaf) for leaf in jax.tree.leaves(tree)]
    info = jnp.finfo(jnp.result_type(jnp.float32, *leaves))
    # Squares of the largest and of the least numbers are in range once these are scaled by it.
    far = 2.0 ** (0.75 * info.maxexp)

    def norm(scale: ArrayLike) -> Array:
        scaled = [leaf * scale for leaf in leaves]
        return jnp.sqrt(tree_vdot(scaled, scaled).astype(info.dtype)) / scale

    # No loop over the two, although they would be compiled once: XLA makes one kernel of a loop so
    # small on CPU, and LLVM takes ten seconds and more for it.
    squares = tree_vdot(leaves, leaves).astype(info.dtype)
    in_range = (squares > info.tiny / info.eps) & (squares < info.max)
    scale = jnp.where(squares < 1, far, 1 / far).astype(info.dtype)
    return jax.lax.cond(in_range, lambda: jnp.sqrt(squares), lambda: norm(scale))


def unit(tree: PyTree, norm: Array | None = None) -> PyTree:
    """``tree`` divided by its ``norm``; zeros stay zeros."""
    norm = tree_norm(tree) if norm is None else norm
    divisor = computed_once(jnp.where(norm > 0, norm, 1))
    return jax.tree.map(lambda x: (widen(x) / divisor).astype(x.dtype), tree)


def divide_above_rounding(x: Array, squares: Array) -> Array:
    """X / sqrt(squares); 0 where the squares are below eps: the quotient would swamp all others."""
    usable = squares > jnp.finfo(x.dtype).eps
    return jnp.where(usable, x / jnp.sqrt(jnp.where(usable, squares, 1)), 0)


def pairwise(
    product: Callable[[Any, Any], Array], left: Sequence[Any], right: Sequence[Any]
) -> Array:
    """The matrix of ``product(a, b)``."""
    return jnp.stack([jnp.stack([product(a, b) for b in right]) for a in left])


def as_finite(x: Array) -> Array:
    """``x`` within the range of its dtype; NaN as the largest number."""
    largest = jnp.finfo(x.dtype).max
    return jnp.clip(jnp.where(jnp.isnan(x), largest, x), -largest, largest)


def tree_is_finite(tree: PyTree) -> Array:
    """Whether every entry is finite."""
    sums = [sum_entries(leaf - leaf) for leaf in jax.tree.leaves(tree)]  # zeros, or NaN
    return computed_once(jnp.isfinite(sum(sums, jnp.zeros((), jnp.float32))))
