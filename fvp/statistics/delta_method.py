"""Standard errors of functions of the estimates, and the Cramer-Rao bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, counted
from fvp.curvature import CurvatureOperator
from fvp.numerics import tree_vdot, widen, widen_tree
from fvp.solvers import cg
from fvp.typing import Params


class Estimate(NamedTuple):
    """A function of the estimates, and how far it is known.

    Attributes:
      value: g(params), of any shape.
      standard_error: of the shape of ``value``.
      covariance: (K, K) for the K entries of ``value`` in order.
    """

    value: Array
    standard_error: Array
    covariance: Array


def delta_method(
    function: Callable[[Params], Array],
    params: Params,
    covariance: ArrayLike | None = None,
    *,
    information: CurvatureOperator | None = None,
    tol: float = 1e-6,
    maxiter: int | None = None,
) -> Estimate:
    r"""The standard error of g(params): the root of the diagonal of G C G^T, G = dg / dparams.

    C is the covariance of the estimates. With C = (n F)^-1 this is the Cramer-Rao bound on the
    variance of every unbiased estimate of g.

    Args:
      function: g, differentiable; maps parameters to a floating-point scalar or array.
      params: the estimates; pytree of floating-point arrays.
      covariance: C, a (P, P) matrix such as `fvp.parameter_covariance` gives. For one forward
        pass of g in each of P directions or a backward one for each entry of g.
      information: or an operator A of the mean loss, such as ``fvp.fisher(...)``, for C = (n A)^-1
        with n its sum of weights, ``A.total``. One solve by `fvp.cg` for each entry of g, and
        no matrix of the parameters is formed: for large models. A must be positive definite.
      tol: relative residual that the solves end at.
      maxiter: most iterations of a solve; see `fvp.cg`.

    Returns:
      An `Estimate`. Under ``jit`` it is NaN where a solve did not converge.

    Raises:
      ValueError: if not one of ``covariance`` and ``information`` is given, for a covariance of
        another shape, and where a solve does not converge: the information is singular, or
        ``maxiter`` too small.
      TypeError: if ``information`` is no operator, or g is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, w = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0], [2.0]])
      >>> F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x)
      >>> ratio = fvp.delta_method(lambda w: w[0, 0] / w[1, 0], w, information=F)
      >>> print(ratio.value, ratio.standard_error)  # sqrt((1 / 2)^2 + (3 / 4)^2 / 4)
      1.5 0.625

    Reference:
      A. van der Vaart, Asymptotic Statistics, 1998, chapter 3.
    """
    if (covariance is None) == (information is None):
        raise ValueError("covariance, information: delta_method takes one of the two.")
    params = check_inexact_tree(params, "params")
    value = jax.eval_shape(function, params)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"function: expected one floating-point array as its value, got {value}.")
    value, pullback = jax.vjp(function, params)
    units = jnp.eye(value.size, dtype=value.dtype).reshape(value.size, *value.shape)
    rows = jax.vmap(lambda unit: pullback(unit)[0])(units)
    if information is None:
        variance = _by_matrix(rows, params, widen(jnp.asarray(covariance)))
    else:
        variance = _by_solves(rows, information, tol, maxiter)
    errors = jnp.sqrt(jnp.diagonal(variance)).reshape(value.shape)
    return Estimate(value, errors.astype(value.dtype), variance)


def _by_matrix(rows: Params, params: Params, covariance: Array) -> Array:
    size = ravel_pytree(params)[0].size
    if covariance.shape != (size, size):
        raise ValueError(
            f"covariance: expected shape {(size, size)}, one row for each of the {size} numbers of"
            f" params, got {covariance.shape}."
        )
    gradient = jax.vmap(lambda row: ravel_pytree(widen_tree(row))[0])(rows)
    return _multiply(_multiply(gradient, covariance), gradient.T)


def _by_solves(
    rows: Params, information: CurvatureOperator, tol: float, maxiter: int | None
) -> Array:
    if not isinstance(information, CurvatureOperator):
        raise TypeError(
            f"information: expected an operator such as fvp.fisher(...), got {information!r}."
        )
    solve = lambda row: cg(information, row, tol=tol, maxiter=maxiter)
    solutions, info = jax.lax.map(solve, rows)
    converged = jnp.all(info.converged)
    if not isinstance(converged, Tracer) and not converged:
        raise ValueError(
            "information: conjugate gradients did not converge in"
            f" {counted(info.iterations.max(), 'iteration')}, to a relative residual of {tol}."
            " Either it is singular (fvp.parameter_covariance names the null directions), or"
            " maxiter= or tol= is too small."
        )
    inner = jax.vmap(jax.vmap(tree_vdot, (None, 0)), (0, None))
    variance = inner(rows, solutions) / information.total
    return jnp.where(converged, 0.5 * (variance + variance.T), jnp.nan)


def _multiply(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
