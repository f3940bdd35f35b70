"""The KL divergence between a model at two parameters."""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_like
from fvp.compilation import compiled_when_eager
from fvp.curvature import Problem
from fvp.heads import Head
from fvp.typing import Batch, ModelFn, Params, PyTree


def kl_divergence(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    new_params: Params,
    batch: Batch,
    *,
    weights: ArrayLike | None = None,
    batch_axes: PyTree = 0,
) -> Array:
    r"""The mean KL divergence, sum_i w_i KL(r(z_i) to r(z_i')) / sum_i w_i.

    z and z' are the outputs at ``params`` and ``new_params``. Exact, and with its digits where the
    two are close: about 1/2 d^T F d for their difference d and the Fisher F.

    Args:
      model_fn: as ``head``, ``batch``, ``weights`` and ``batch_axes``, described at
        `fvp.fisher`.
      head: see there.
      params: parameters of the distribution that the expectation is over.
      new_params: those of the other, a pytree like ``params``.
      batch: see there.
      weights: see there.
      batch_axes: see there.

    Returns:
      A scalar in float32 or wider; differentiable in both parameters.

    Raises:
      ValueError: if ``new_params`` has not the structure and shapes of ``params``, or as
        `fvp.fisher`.
      TypeError: as `fvp.fisher`.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, model = jnp.array([[1.0], [2.0]]), lambda w, x: x @ w
      >>> w = jnp.zeros((1, 1))
      >>> print(fvp.kl_divergence(model, fvp.Gaussian(), w, w + 1, x))  # mean of x^2 / 2
      1.25

    Reference:
      S. Kullback, R. Leibler, On information and sufficiency, 1951.
    """
    data = {"weights": weights, "batch_axes": batch_axes}
    problem = Problem.of(model_fn, head, params, batch, **data)
    return _mean_divergence(problem, check_like(new_params, problem.params, "new_params", "params"))


@compiled_when_eager
def _mean_divergence(problem: Problem, new_params: Params) -> Array:
    problem = problem.present()
    return problem.kl(problem.outputs(problem.params), problem.outputs(new_params))
