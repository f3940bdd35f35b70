"""One-call products, compiled when called eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_like
from fvp.compilation import compiled_when_eager
from fvp.curvature import operators
from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.operators import ModelFn
from fvp.heads import Head


def fisher_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    vector: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
) -> Any:
    """``fvp.fisher(...) @ vector`` in one call.

    To multiply several vectors at one ``params`` and ``batch``, build the operator once: each of
    its products saves the forward pass.

    Args, raises: as :func:`fvp.fisher`; ``vector`` is a pytree like ``params``.

    Returns:
      F v, a pytree like ``params``.

    Example:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> w = jnp.zeros((2, 1))
      >>> model = lambda w, x: x @ w
      >>> print(fvp.fisher_vector_product(model, fvp.Gaussian(scale=2.0), w, x, jnp.ones((2, 1))))
      [[3.  ]
       [4.25]]
    """
    return _one_call(
        operators.fisher, model_fn, head, params, batch, (), vector, weights, chunk_size, batch_axes
    )


def ggn_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    vector: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
) -> Any:
    """``fvp.ggn(...) @ vector`` in one call; see :func:`fisher_vector_product`."""
    ys = (targets,)
    return _one_call(
        operators.ggn, model_fn, head, params, batch, ys, vector, weights, chunk_size, batch_axes
    )


def empirical_fisher_vector_product(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    vector: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
) -> Any:
    """``fvp.empirical_fisher(...) @ vector`` in one call; see :func:`fisher_vector_product`."""
    build, ys = operators.empirical_fisher, (targets,)
    return _one_call(
        build, model_fn, head, params, batch, ys, vector, weights, chunk_size, batch_axes
    )


def _one_call(
    build: Callable[..., CurvatureOperator],
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: tuple[Any, ...],
    vector: Any,
    weights: Any,
    chunk_size: int | None,
    batch_axes: Any,
) -> Any:
    params = check_inexact_tree(params, "params")
    vector = check_like(vector, params, "vector", "params")
    leaves, structure = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
    axes = (structure, tuple(leaves))  # hashable, whatever container came
    return _build_and_multiply(
        build, model_fn, chunk_size, axes, head, params, batch, targets, vector, weights
    )


@compiled_when_eager
def _build_and_multiply(
    build: Callable[..., CurvatureOperator],
    model_fn: ModelFn,
    chunk_size: int | None,
    axes: tuple[Any, tuple[int | None, ...]],
    head: Head,
    params: Any,
    batch: Any,
    targets: tuple[Any, ...],
    vector: Any,
    weights: Any,
) -> Any:
    batch_axes = jax.tree.unflatten(*axes)
    operator = build(
        model_fn,
        head,
        params,
        batch,
        *targets,
        weights=weights,
        chunk_size=chunk_size,
        batch_axes=batch_axes,
    )
    return operator.mv(vector)
