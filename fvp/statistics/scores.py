"""The Fisher of a density: the covariance of the scores of log p(x given params) itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_positive_int
from fvp.curvature import CurvatureOperator, FisherCurvature
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.operator import build_operator
from fvp.curvature.problem import Problem, apply_weights
from fvp.heads import Gaussian
from fvp.model import close_model
from fvp.numerics import wide_dtype, widen
from fvp.typing import Params, PyTree


def score_fisher(
    log_prob: Callable[[Params, Any], Array],
    params: Params,
    samples: PyTree,
    *,
    weights: ArrayLike | None = None,
    centered: bool = True,
) -> CurvatureOperator:
    r"""The covariance of the scores O_i = d log_prob(params, x_i) / dparams at given samples.

    With p_i = w_i / sum_j w_j it is the real part of

    $$\sum_i p_i\, \bar O_i O_i^T - \bar m\, m^T, \qquad m = \sum_i p_i O_i,$$

    and the second moment, without the second term, where ``centered`` is False. ``log_prob`` need
    not be normalised: a constant that depends on params alone drops out of the centred scores. For
    samples of the density this estimates its Fisher. Of log psi, complex or real, it is the real
    part of the quantum geometric tensor, the matrix S of stochastic reconfiguration.

    Args:
      log_prob: ``log_prob(params, x)`` of one sample; a scalar, real or complex, differentiable.
      params: pytree of real floating-point arrays.
      samples: x_1 ... x_N, a pytree of arrays with the samples on the first axis.
      weights: (N,) weights of the samples, or None.
      centered: whether the mean score is taken out.

    Returns:
      A `CurvatureOperator`, for `fvp.cg` and `fvp.solve_dual` among others. Its
      ``output`` is the (centred) log_prob, (N, 1), or (N, 2) of real and imaginary parts. Its
      ``transpose_product(u)`` is the covariance of the scores with u, shaped like the output: of
      local energies it is half the gradient of the energy of a real psi.

    Raises:
      ValueError: if ``log_prob`` is not a scalar, or for weights that do not fit.
      TypeError: for parameters that are not real floating-point arrays.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> log_prob = lambda w, x: -0.5 * (x - w) ** 2  # score x - w
      >>> S = fvp.score_fisher(log_prob, jnp.array(0.0), jnp.array([1.0, 2.0, 6.0]))
      >>> print((S @ jnp.array(3.0)).round(4))  # 3 times the variance of 1, 2, 6
      14.0

    Reference:
      S. Amari, Natural gradient works efficiently in learning, 1998; S. Sorella, Green function
      Monte Carlo with stochastic reconfiguration, 1998.
    """
    params = check_inexact_tree(params, "params")
    if not callable(log_prob):
        raise TypeError(f"log_prob: expected log_prob(params, x), got {log_prob!r}.")
    model = lambda centered: jax.tree_util.Partial(_log_probabilities, log_prob, centered)
    data = (samples, None if weights is None else jnp.asarray(weights))
    problem = Problem.of(model(centered), Gaussian(), params, data, weights=weights)
    if centered:
        problem = dataclasses.replace(problem, uncentered=close_model(model(False), data)[0])
    return build_operator(gauss_newton_of(FisherCurvature), problem, None)


def density_fisher(
    log_prob: Callable[[Params, Any], Array],
    sample: Callable[[Params, Array], Any],
    params: Params,
    key: Array,
    num_samples: int,
) -> CurvatureOperator:
    r"""The Fisher of a model p(x given params) of x itself, F = E_x[score score^T].

    Monte Carlo: the second moment of the scores of ``num_samples`` draws. The density has to be
    normalised, so that the mean of its score is zero; else take `fvp.score_fisher`.

    Of a joint p(x, y) it is that of p(x) plus the mean over x of that of p(y given x), which
    `fvp.fisher` knows without drawing y; the cross terms are of mean zero.

    Args:
      log_prob: ``log_prob(params, x)``, a real scalar, differentiable in params.
      sample: ``sample(params, key)`` draws one x, an array or a pytree.
      params: pytree of floating-point arrays.
      key: a ``jax.random`` key.
      num_samples: how many x to draw; the matrix has at most this rank.

    Returns:
      A `CurvatureOperator` over trees like ``params``; the samples are drawn once.

    Raises:
      ValueError, TypeError: as `fvp.score_fisher`, and for a number of samples below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> log_prob = lambda w, x: -0.5 * (x - w) ** 2 - 0.5 * jnp.log(2 * jnp.pi)
      >>> sample = lambda w, key: w + jax.random.normal(key)
      >>> F = fvp.density_fisher(log_prob, sample, jnp.array(3.0), jax.random.key(0), 10_000)
      >>> bool(abs(F @ jnp.array(1.0) - 1) < 0.05)
      True

    Reference:
      R. Fisher, Theory of statistical estimation, 1925.
    """
    check_positive_int(num_samples, "num_samples")
    params = check_inexact_tree(params, "params")
    draw = lambda key: jax.lax.stop_gradient(sample(params, key))
    samples = jax.vmap(draw)(jax.random.split(key, num_samples))
    return score_fisher(log_prob, params, samples, centered=False)


def _log_probabilities(log_prob: Any, centered: bool, params: Params, data: Any) -> Array:
    """The log-probabilities (N, 1), or (N, 2) where they are complex, maybe less their mean."""
    samples, weights = data
    values = jax.vmap(lambda x: log_prob(params, x))(samples)
    if values.ndim != 1:
        raise ValueError(
            f"log_prob: expected a scalar for one sample, got shape {values.shape[1:]}."
        )
    parts = [values.real, values.imag] if jnp.iscomplexobj(values) else [values]
    z = jnp.stack(parts, axis=-1)
    return _less_mean(z, weights) if centered else z


def _less_mean(z: Array, weights: Array | None) -> Array:
    """The rows of ``z`` less their weighted mean."""
    if weights is not None:
        weights = jnp.broadcast_to(weights, z.shape[:1]).astype(wide_dtype(z.dtype))
    total = z.shape[0] if weights is None else jnp.sum(weights)
    summed = jnp.sum(apply_weights(weights, 1, widen(z)), axis=0)
    return z - (summed / jnp.where(total == 0, 1, total)).astype(z.dtype)
