"""Operators of this library for others, as maps of vectors in the order of ``ravel_pytree``.

A solution of theirs becomes a tree again by ``jax.flatten_util.ravel_pytree(params)[1]``. Each
package is imported when its adapter is called: none is needed to import fvp.

An operator is any of this library, or a callable ``v -> A v`` on trees, for which ``like=`` names a
tree of the same structure and shapes. It has to be symmetric, as every curvature is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.raveled import Raveled
from fvp.typing import PyTree

__all__ = ["Matfree", "as_lineax", "as_matfree", "as_scipy"]


def as_lineax(operator: Any, *, like: PyTree = None, positive_semidefinite: bool = True) -> Any:
    """A ``lineax.FunctionLinearOperator`` over vectors (P,), symmetric.

    Args:
      operator: a curvature operator, or any symmetric callable ``v -> A v`` on trees.
      like: pytree like what ``operator`` multiplies; needed for callables only.
      positive_semidefinite: whether to tag it so, which ``lineax.CG`` asks for. False for what may
        be indefinite, such as `fvp.hessian`.

    Raises:
      TypeError: for what can't be called, or for a callable without ``like``.

    Examples:
      >>> import jax.numpy as jnp, lineax, fvp, fvp.interop
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> solver = lineax.CG(rtol=1e-6, atol=1e-6)
      >>> solution = lineax.linear_solve(fvp.interop.as_lineax(F), jnp.array([12.0, 17.0]), solver)
      >>> print(solution.value.round(3))
      [1. 1.]
    """
    import lineax

    raveled = Raveled.of(operator, like)
    tags = [lineax.symmetric_tag]
    if positive_semidefinite:
        tags.append(lineax.positive_semidefinite_tag)
    shape = jax.ShapeDtypeStruct((raveled.size,), raveled.dtype)
    return lineax.FunctionLinearOperator(raveled.mv, shape, tags)


def as_scipy(operator: Any, *, like: PyTree = None) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` of shape (P, P): for ``eigsh``, ``lobpcg``, ``cg``.

    Its products start from NumPy and end there, so it can't be traced by ``jit``.

    Args:
      operator: a curvature operator, or any symmetric callable ``v -> A v`` on trees.
      like: pytree like what ``operator`` multiplies; needed for callables only.

    Raises:
      TypeError: for what can't be called, or for a callable without ``like``.

    Examples:
      >>> import jax.numpy as jnp, fvp, fvp.interop
      >>> from scipy.sparse import linalg
      >>> A = fvp.interop.as_scipy(lambda v: jnp.arange(9.0) * v, like=jnp.zeros(9))
      >>> print(linalg.eigsh(A, 2, return_eigenvectors=False).round(3))
      [7. 8.]
    """
    from scipy.sparse.linalg import LinearOperator

    raveled = Raveled.of(operator, like)

    def product(v: Any) -> Any:
        return np.asarray(raveled.mv(jnp.asarray(np.ravel(v), raveled.dtype)))

    shape, dtype = (raveled.size, raveled.size), np.dtype(raveled.dtype)
    return LinearOperator(shape, matvec=product, rmatvec=product, dtype=dtype)  # pyright: ignore


class Matfree(NamedTuple):
    """What the functions of matfree take.

    Attributes:
      matvec: v -> A v for vectors (P,).
      like: (P,) zeros, for its samplers and as the shape of a start vector.
    """

    matvec: Callable[[Array], Array]
    like: Array


def as_matfree(operator: Any, *, like: PyTree = None) -> Matfree:
    """The product with vectors (P,), and zeros of their shape and dtype.

    For what this library leaves to matfree, such as log-determinants and spectral densities by
    stochastic Lanczos quadrature.

    Args:
      operator: a curvature operator, or any symmetric callable ``v -> A v`` on trees.
      like: pytree like what ``operator`` multiplies; needed for callables only.

    Raises:
      TypeError: for what can't be called, or for a callable without ``like``.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp, fvp.interop
      >>> from matfree import decomp, funm, stochtrace
      >>> matvec, like = fvp.interop.as_matfree(lambda v: 2 * v, like=jnp.zeros(8))
      >>> integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(1))
      >>> sampler = stochtrace.sampler_signs(like, num=3)
      >>> estimate = stochtrace.estimator_monte_carlo(integrand, sampler)
      >>> print(estimate(matvec, jax.random.key(0)).round(3))  # 8 log 2
      5.545
    """
    raveled = Raveled.of(operator, like)
    return Matfree(raveled.mv, jnp.zeros(raveled.size, raveled.dtype))
