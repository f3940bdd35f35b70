"""The largest eigenvalues and their eigenvectors, from products alone."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_positive_int
from fvp.estimation.compiled import compiled_for_operators
from fvp.numerics import power_of_two
from fvp.raveled import Raveled
from fvp.typing import Params, PyTree

# docs/decisions/solvers.md
_MORE = 4  # vectors of a block beyond those wanted
_BLOCKS, _WIDTH = 8, 40  # of a span: at least so many blocks, and vectors
_ROUNDS = 300

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def eigenpairs(
    operator: Any, k: int, key: Array, *, like: PyTree = None, tol: float | None = None
) -> tuple[Array, Params]:
    r"""The ``k`` largest eigenvalues of a symmetric operator, and their eigenvectors.

    By block Lanczos: the operator's powers are applied to a block of random vectors, every new
    block is made orthogonal to all before it, and the best approximations in their span start the
    next round. A block has ``k`` vectors and a few more, so that eigenvalues of any multiplicity
    are found as often as they occur. Eigenvalues count with their sign: of a Hessian ``H`` the
    lowest are minus those of ``lambda v: jax.tree.map(jnp.negative, H @ v)``.

    Memory is that of about 40 vectors, or of 8 (k + 4) where that is more.

    Args:
      operator: a curvature operator, or any symmetric callable ``v -> A v`` on trees.
      k: how many, at most the number P of parameters.
      key: a ``jax.random`` key, for the block that it starts from.
      like: pytree like what ``operator`` multiplies; needed for callables only.
      tol: rounds end when every |A v - lambda v| is at most ``tol`` times the largest |lambda| met,
        and after 300 rounds. The square root of the rounding unit when None; the eigenvalues are
        then mostly good to the rounding unit.

    Returns:
      ``(eigenvalues, eigenvectors)``: (k,) in descending order, and a tree like the parameters with
      a leading axis of ``k``, in float32 or wider, orthonormal. In the given precision an
      eigenvector is known up to its sign; those of equal eigenvalues up to a rotation.

    Raises:
      ValueError: for more eigenvalues than parameters.
      TypeError: for what can't be called, or for a callable without ``like``.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> scales = jnp.arange(1.0, 101.0)
      >>> values, vectors = fvp.eigenpairs(lambda v: scales * v, 3, jax.random.key(0), like=scales)
      >>> print(*(f"{value:.3f}" for value in values), vectors.shape)
      100.000 99.000 98.000 (3, 100)

    Reference:
      G. Golub, R. Underwood, The block Lanczos method for computing eigenvalues, 1977; K. Wu,
      H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.
    """
    check_positive_int(k, "k")
    raveled = Raveled.of(operator, like)
    if k > raveled.size:
        raise ValueError(f"k: expected at most the {raveled.size} parameters, got {k}.")
    level = float(jnp.finfo(raveled.dtype).eps) ** 0.5 if tol is None else tol
    values, vectors = _eigenpairs(operator, like, key, level, k)
    return values, jax.vmap(raveled.unravel)(vectors.T)


@compiled_for_operators
def _eigenpairs(operator: Any, like: PyTree, key: Array, tol: float, k: int) -> tuple[Array, Array]:
    raveled = Raveled.of(operator, like)
    block = k + _MORE
    blocks = max(_BLOCKS, _WIDTH // block)
    if block * blocks >= raveled.size:
        return _all_of_them(raveled, k)
    return _block_lanczos(raveled, key, tol, k, block, blocks)


def _all_of_them(raveled: Raveled, k: int) -> tuple[Array, Array]:
    """From the dense matrix, where it is no larger than the span would be."""
    matrix = jax.lax.map(raveled.mv, jnp.eye(raveled.size, dtype=raveled.dtype))
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


class _Round(NamedTuple):
    number: Array
    values: Array  # (block,) descending
    vectors: Array  # (P, block) orthonormal
    images: Array  # their products
    residual: Array  # the largest |A v - lambda v| of those wanted
    size: Array  # the largest |lambda| met


def _block_lanczos(
    raveled: Raveled, key: Array, tol: float, k: int, block: int, blocks: int
) -> tuple[Array, Array]:
    random = jax.random.normal(key, (raveled.size, block), raveled.dtype)
    start, _ = jnp.linalg.qr(random)
    images = jax.lax.map(raveled.mv, start.T).T
    unit = power_of_two(jnp.max(jnp.abs(images)))  # the squares of tiny curvatures would underflow
    products = lambda columns: jax.lax.map(raveled.mv, columns.T).T / unit

    def unfinished(last: _Round) -> Array:
        return (last.number < _ROUNDS) & ~(last.residual <= tol * last.size)

    def another(last: _Round) -> _Round:
        noise = jax.random.split(jax.random.fold_in(key, last.number + 1), blocks)
        span, matrix = _span(products, last, noise)
        values, rotation = jnp.linalg.eigh(matrix)
        values, rotation = values[::-1], rotation[:, ::-1]
        vectors, _ = jnp.linalg.qr(_matmul(span, rotation[:, :block]))
        images = products(vectors)
        size = jnp.maximum(last.size, jnp.max(jnp.abs(values)))
        return _round(last.number + 1, values[:block], vectors, images, k, size)

    zeros = jnp.zeros((block,), raveled.dtype)
    first = _round(jnp.zeros((), jnp.int32), zeros, start, images / unit, k, zeros[0])
    first = first._replace(residual=jnp.full_like(first.residual, jnp.inf))
    last = jax.lax.while_loop(unfinished, another, first)
    return unit * last.values[:k], last.vectors[:, :k]


def _round(
    number: Array, values: Array, vectors: Array, images: Array, k: int, size: Array
) -> _Round:
    residuals = jnp.linalg.norm(images - vectors * values, axis=0)
    return _Round(number, values, vectors, images, jnp.max(residuals[:k]), size)


def _span(products: Any, last: _Round, noise: Array) -> tuple[Array, Array]:
    """An orthonormal basis of the block and its powers, (P, m), and the operator in it."""
    block = last.vectors.shape[1]
    width = block * len(noise)
    span = jnp.zeros((len(last.vectors), width), last.vectors.dtype).at[:, :block].set(last.vectors)
    matrix = jnp.zeros((width, width), span.dtype).at[:, :block].set(_matmul(span.T, last.images))

    def grow(i: Array, state: Any) -> Any:
        span, matrix, images = state
        vectors = _orthonormal(span, images, noise[i])
        images = products(vectors)
        span = jax.lax.dynamic_update_slice_in_dim(span, vectors, i * block, 1)
        columns = _matmul(span.T, images)
        matrix = jax.lax.dynamic_update_slice_in_dim(matrix, columns, i * block, 1)
        return span, matrix, images

    span, matrix, _ = jax.lax.fori_loop(1, len(noise), grow, (span, matrix, last.images))
    upper = jnp.triu(matrix)  # what a block knows of those after it are zeros
    return span, upper + jnp.triu(matrix, 1).T


def _orthonormal(span: Array, columns: Array, key: Array) -> Array:
    """A basis of what ``columns`` add to ``span``; random where that is nothing but rounding."""
    norm = jnp.max(jnp.linalg.norm(columns, axis=0))
    level = jnp.finfo(columns.dtype).eps * norm / len(columns) ** 0.5
    level = jnp.where(norm > 0, level, 1)
    columns += level * jax.random.normal(key, columns.shape, columns.dtype)
    # Rounding in the first pass is relative to the columns, in the others to a unit vector.
    for _ in range(3):
        columns -= _matmul(span, _matmul(span.T, columns))
        columns, _ = jnp.linalg.qr(columns)
    return columns
