"""The trace from products with a few random vectors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_positive_int
from fvp.estimation.compiled import compiled_for_operators
from fvp.numerics import power_of_two
from fvp.raveled import Raveled
from fvp.typing import PyTree

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def trace(operator: Any, key: Array, num_products: int, *, like: PyTree = None) -> Array:
    r"""The trace of a symmetric operator, by XTrace: unbiased, from ``num_products`` products.

    Half of the products are with random vectors W = [w_1 ... w_k]. For each i an orthonormal basis
    Q_i of the images A w_j, j != i, takes the trace of the part of A that it spans exactly, and w_i
    that of the rest, in the manner of Hutchinson; the estimate is the mean over i of

        tr(Q_i^T A Q_i) + c_i u_i^T A u_i,    u_i = (I - Q_i Q_i^T) w_i,

    with c_i = (P - k + 1) / |u_i|^2. The images of all Q_i are among those of one basis, which the
    other half of the products are with. Where the eigenvalues decay, as a Fisher's do, the error
    falls faster than the 1 / sqrt(num_products) of Hutchinson's estimate. From P products on, for P
    parameters, the diagonal is summed instead, and the trace is exact.

    Args:
      operator: a curvature operator, or any symmetric callable ``v -> A v`` on trees.
      key: a ``jax.random`` key.
      num_products: most products to spend: 2 or more, or 1 where there is one parameter.
      like: pytree like what ``operator`` multiplies; needed for callables only.

    Returns:
      A scalar in float32 or wider.

    Raises:
      ValueError: for too few products.
      TypeError: for what can't be called, or for a callable without ``like``.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> scales = 1.0 / jnp.arange(1.0, 1001.0) ** 2
      >>> estimate = fvp.trace(lambda v: scales * v, jax.random.key(0), 50, like=scales)
      >>> bool(abs(estimate - scales.sum()) < 0.01 * scales.sum())
      True

    Reference:
      E. Epperly, J. Tropp, R. Webber, XTrace: Making the most of every sample in stochastic trace
      estimation, 2024.
    """
    check_positive_int(num_products, "num_products")
    size = Raveled.of(operator, like).size
    if num_products < min(2, size):
        raise ValueError(f"num_products: expected 2 or more, got {num_products}.")
    return _trace(operator, like, key, min(num_products, size))


@compiled_for_operators
def _trace(operator: Any, like: PyTree, key: Array, num_products: int) -> Array:
    raveled = Raveled.of(operator, like)
    if num_products == raveled.size:
        return _sum_of_diagonal(raveled)
    return _xtrace(raveled, key, num_products // 2)


def _sum_of_diagonal(raveled: Raveled) -> Array:
    def entry(i: Array) -> Array:
        return raveled.mv(jax.nn.one_hot(i, raveled.size, dtype=raveled.dtype))[i]

    return jnp.sum(jax.lax.map(entry, jnp.arange(raveled.size)))


def _xtrace(raveled: Raveled, key: Array, count: int) -> Array:
    """From products with ``count`` random vectors, and ``count`` of a basis of their images."""
    size = raveled.size
    products = lambda columns: jax.lax.map(raveled.mv, columns.T).T
    tests = jax.random.normal(key, (size, count), raveled.dtype)
    tests *= jnp.sqrt(size).astype(tests.dtype) / jnp.linalg.norm(tests, axis=0)
    sketch = products(tests)
    unit = power_of_two(jnp.max(jnp.abs(sketch)))  # the squares of tiny curvatures would underflow
    basis, images = jnp.linalg.qr(sketch / unit)  # images: those of the tests, in the basis
    inside = _matmul(basis.T, products(basis) / unit)
    projected = _matmul(basis.T, tests)
    # Column i: what the basis loses without image i. R^T s = e_i, as s meets all other images not.
    identity = jnp.eye(count, dtype=images.dtype)
    lost = jax.scipy.linalg.solve_triangular(_regular(images), identity, trans=1)
    lost /= jnp.linalg.norm(lost, axis=0)
    kept = projected - lost * jnp.sum(lost * projected, axis=0)
    # u^T A u of the rest u = w - Q kept, for the images A w = Q R.
    rest = jnp.sum((projected - 2 * kept) * images, axis=0) + _forms(inside, kept)
    scale = (size - count + 1) / (size - jnp.sum(kept**2, axis=0))
    return unit * (jnp.trace(inside) + jnp.mean(scale * rest - _forms(inside, lost)))


def _forms(matrix: Array, columns: Array) -> Array:
    """v^T (matrix) v for each of the columns v."""
    return jnp.sum(columns * _matmul(matrix, columns), axis=0)


def _regular(triangular: Array) -> Array:
    """The factor R of images that depend on each other, as of images apart by rounding."""
    diagonal = jnp.diagonal(triangular)
    largest = jnp.max(jnp.abs(triangular))
    least = jnp.finfo(triangular.dtype).eps * jnp.where(largest > 0, largest, 1)
    sign = jnp.where(diagonal < 0, -1, 1).astype(triangular.dtype)
    more = jnp.where(jnp.abs(diagonal) < least, sign * least - diagonal, 0)
    return triangular + jnp.diag(more)
