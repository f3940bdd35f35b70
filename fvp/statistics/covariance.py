"""Covariance and standard errors of maximum likelihood estimates."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree
from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator, empirical_fisher, fisher, hessian
from fvp.heads import Head
from fvp.numerics import widen
from fvp.statistics.information import InvertedInformation
from fvp.typing import Batch, ModelFn, Params, PyTree

KINDS = ("expected", "observed", "sandwich")


def parameter_covariance(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree = None,
    *,
    weights: ArrayLike | None = None,
    kind: str = "expected",
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Array:
    r"""The asymptotic covariance of maximum likelihood estimates, a dense (P, P) matrix.

    With F the Fisher and H the Hessian of the mean loss, n = sum_i w_i (the number of examples
    without weights) and g_i the gradient of nll_i, it is

    - "expected": (n F)^-1; right where the model is, the Cramer-Rao bound;
    - "observed": (n H)^-1, the same to first order, at the data's own curvature;
    - "sandwich": (n H)^-1 (sum_i w_i^2 g_i g_i^T) (n H)^-1, right for independent examples where
      the distribution is not (White's HC0, robust or Huber-White errors).

    ``params`` are the estimates, a minimum of the loss. Weights are how much an example counts: to
    the sandwich it is one draw, whatever its weight.
    The scale of a `fvp.Gaussian` is part of the model: least squares with the errors of a
    linear regression takes ``fvp.Gaussian(scale=s)``, s^2 = residual sum of squares / (N - P).

    Args:
      model_fn: as all arguments up to ``targets``, described at `fvp.fisher`.
      head: see there.
      params: see there.
      batch: see there.
      targets: the data's labels; not read by "expected".
      weights: see there; not negative.
      kind: "expected", "observed" or "sandwich".
      chunk_size: examples linearised at a time; see there.
      batch_axes: see there.

    Returns:
      The matrix in ``ravel_pytree`` order, in float32 or wider. Columns of badly scaled data want
      float64. Under ``jit`` or ``vmap``, where nothing can be raised, NaN marks what is singular.

    Raises:
      ValueError: naming the parameters in the null directions of a singular information: those of
        its correlation matrix with eigenvalues up to eps sqrt(N) P times the largest, what rounding
        makes of zero; naming those of negative ones; for an unknown ``kind``, missing ``targets``,
        or as `fvp.fisher`.
      TypeError: as `fvp.fisher`.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, model = jnp.array([[1.0, 0.0], [0.0, 2.0]]), lambda w, x: x @ w
      >>> covariance = fvp.parameter_covariance(model, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print(covariance.round(4))
      [[1.   0.  ]
       [0.   0.25]]

    Reference:
      H. White, Maximum likelihood estimation of misspecified models, 1982.
    """
    _check_kind(kind, targets)
    params = check_inexact_tree(params, "params")
    options = {"chunk_size": chunk_size, "batch_axes": batch_axes}
    problem = (model_fn, head, params, batch)
    if kind == "expected":
        operator = fisher(*problem, weights=weights, **options)
    else:
        operator = hessian(*problem, targets, weights=weights, **options)
    inverted = _inverted(operator, _count(operator, head))
    inverted.check(params, kind)
    if kind != "sandwich":
        return inverted.inverse
    squares = None if weights is None else jnp.square(widen(jnp.asarray(weights)))
    scores = empirical_fisher(*problem, targets, weights=squares, **options)
    return _sandwich(inverted.inverse, scores)


def standard_errors(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree = None,
    *,
    weights: ArrayLike | None = None,
    kind: str = "expected",
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Params:
    """Standard errors of maximum likelihood estimates: the root of the covariance's diagonal.

    Args, raises: as `fvp.parameter_covariance`, whose matrix it forms, and inverts.

    Returns:
      A pytree like ``params``.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, w = jnp.array([[1.0, 0.0], [0.0, 2.0]]), {"slopes": jnp.zeros((2, 1))}
      >>> errors = fvp.standard_errors(lambda w, x: x @ w["slopes"], fvp.Gaussian(), w, x)
      >>> print(errors["slopes"].T)
      [[1.  0.5]]
    """
    data = {"weights": weights, "kind": kind, "chunk_size": chunk_size, "batch_axes": batch_axes}
    covariance = parameter_covariance(model_fn, head, params, batch, targets, **data)
    _, unravel = ravel_pytree(check_inexact_tree(params, "params"))
    flat = jnp.sqrt(jnp.diagonal(covariance))
    return unravel(flat.astype(jax.eval_shape(lambda: ravel_pytree(params)[0]).dtype))


def _check_kind(kind: Any, targets: PyTree) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    if targets is None and kind != "expected":
        raise ValueError(f"targets: kind={kind!r} expects the labels of the batch, got None.")


def _count(operator: CurvatureOperator, head: Head) -> int:
    z = jax.eval_shape(lambda: operator.output)
    return math.prod(head.batch_shape(z))


@compiled_when_eager
def _inverted(operator: CurvatureOperator, count: int) -> InvertedInformation:
    return InvertedInformation.of(operator.total * operator.dense(), count)


@compiled_when_eager
def _sandwich(bread: Array, scores: CurvatureOperator) -> Array:
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    covariance = product(product(bread, scores.total * scores.dense()), bread)
    return 0.5 * (covariance + covariance.T)
