"""One-call products: linearise and multiply, in one program when called eagerly."""

from __future__ import annotations

from jax.typing import ArrayLike

from fvp.checks import check_like
from fvp.compilation import compiled_when_eager
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.operator import build_operator
from fvp.curvature.output_curvature import (
    EmpiricalCurvature,
    FisherCurvature,
    HessianCurvature,
    OutputCurvature,
    check_output_curvature,
)
from fvp.curvature.problem import Problem, required_targets
from fvp.heads import Head
from fvp.typing import Batch, ModelFn, Params, PyTree


def fisher_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Params:
    """``fvp.fisher(...) @ vector`` in one call.

    To multiply several vectors at one ``params`` and ``batch``, build the operator once: each of
    its products saves the forward pass.

    Args, raises: as `fvp.fisher`; ``vector`` is a pytree like ``params``.

    Returns:
      F v, a pytree like ``params``.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> w = jnp.zeros((2, 1))
      >>> model = lambda w, x: x @ w
      >>> print(fvp.fisher_vector_product(model, fvp.Gaussian(scale=2.0), w, x, jnp.ones((2, 1))))
      [[3.  ]
       [4.25]]
    """
    data = {"weights": weights, "batch_axes": batch_axes}
    problem = Problem.of(model_fn, head, params, batch, **data)
    return _product(FisherCurvature, problem, vector, chunk_size)


def ggn_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree,
    vector: Params,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Params:
    """``fvp.ggn(...) @ vector`` in one call; see `fisher_vector_product`."""
    data = {"weights": weights, "batch_axes": batch_axes, "targets": required_targets(targets)}
    problem = Problem.of(model_fn, head, params, batch, **data)
    return _product(HessianCurvature, problem, vector, chunk_size)


def empirical_fisher_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree,
    vector: Params,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Params:
    """``fvp.empirical_fisher(...) @ vector`` in one call; see `fisher_vector_product`."""
    data = {"weights": weights, "batch_axes": batch_axes, "targets": required_targets(targets)}
    problem = Problem.of(model_fn, head, params, batch, **data)
    return _product(EmpiricalCurvature, problem, vector, chunk_size)


def gauss_newton_vector_product(
    kind: type[OutputCurvature],
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    targets: PyTree = None,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
) -> Params:
    """``fvp.gauss_newton(kind, ...) @ vector`` in one call; see `fisher_vector_product`."""
    check_output_curvature(kind, "kind")
    targets = required_targets(targets) if kind.reads_targets else targets
    data = {"weights": weights, "batch_axes": batch_axes, "targets": targets}
    problem = Problem.of(model_fn, head, params, batch, **data)
    return _product(kind, problem, vector, chunk_size)


def _product(
    kind: type[OutputCurvature], problem: Problem, vector: Params, chunk_size: int | None
) -> Params:
    vector = check_like(vector, problem.params, "vector", "params")
    return _linearize_and_multiply(kind, problem, vector, chunk_size)


@compiled_when_eager
def _linearize_and_multiply(
    kind: type[OutputCurvature], problem: Problem, vector: Params, chunk_size: int | None
) -> Params:
    return build_operator(gauss_newton_of(kind), problem, chunk_size).mv(vector)
