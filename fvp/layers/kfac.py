"""Kronecker-factored curvature: from the layers of a model to an operator."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature import (
    EmpiricalCurvature,
    FisherCurvature,
    OutputCurvature,
    Problem,
    SampledCurvature,
)
from fvp.heads import Head
from fvp.layers.captured_batch import capture_batch
from fvp.layers.columns import check_not_negative
from fvp.layers.diagonal import differentiated
from fvp.layers.eigenvalue_correction import with_corrected_eigenvalues
from fvp.layers.factors import WEIGHT_SHARING, kronecker_blocks
from fvp.layers.kfac_operator import KFAC
from fvp.layers.plans import plans_of
from fvp.mesh import auto_sharded
from fvp.tracing.coverage import check_fallback, coverage_of
from fvp.typing import Batch, ModelFn, Params, PyTree


def kfac(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    *,
    targets: PyTree = None,
    weights: ArrayLike | None = None,
    key: Array | None = None,
    num_samples: int = 1,
    weight_sharing: str = "expand",
    eigenvalue_corrected: bool = False,
    batch_axes: PyTree = 0,
    fallback: str | None = None,
) -> KFAC:
    r"""Kronecker-factored Fisher: for each layer, E[x x^T] x E[d d^T].

    x are the inputs of a layer (with a one, where it has a bias), d the cotangents of its outputs
    for the columns of S, S S^T = F_R. The layers are found by tracing ``model_fn``: dense layers in
    any layout, convolutions, lookups, biases, scales. Equal to the Fisher's diagonal block for one
    example without weight sharing, and for deep linear networks with a Gaussian head. Scales and
    biases that belong to no layer have their exact block; one of several axes that is used as it is
    has an exact block for each slice along its last. The inputs of an embedding have a diagonal
    factor.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      params: pytree of floating-point arrays.
      batch: pytree that ``model_fn`` reads.
      targets: the data's labels, for the factors of the empirical Fisher.
      weights: one weight of 0 or more per example, shape = batch axes of z or broadcastable to it.
      key: a ``jax.random`` key, for factors from labels drawn from the model; None is exact.
      num_samples: labels drawn for each example with a ``key``.
      weight_sharing: where a weight is used R times in an example, "expand" treats its uses as
        examples, "reduce" averages their inputs and adds up their cotangents.
      eigenvalue_corrected: EK-FAC: replaces the eigenvalues of the product by the second moments of
        the per-example gradients in its eigenbasis, which is nearest to the Fisher's block there.
      batch_axes: where the example axis of each leaf of ``batch`` is.
      fallback: "per_example" gives parameters without a layer rule their exact diagonal, and serves
        models that mix examples, at one backward pass for each output
        of each example.

    Returns:
      A `KFAC`: ``K @ v``, ``K.solve(v, damping)``, ``K.inverse(damping)`` for ``M=`` of
      `fvp.cg`, ``K.trace()``, ``K.logdet()``, ``K.dense()`` in ``ravel_pytree`` order,
      ``K.coverage``.

    Raises:
      ValueError: naming parameter and primitive where there is no layer rule and no fallback.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> K = fvp.kfac(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print((K @ jnp.ones((2, 1))).round().astype(int))  # a linear model: exact
      [[12]
       [17]]
      >>> print(K.coverage)
      parameter  shape   treatment
      params     (2, 1)  dense

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015; R. Grosse, J. Martens, 2016 (convolutions); R. Eschenhagen et al., 2023
      (expand and reduce); T. George et al., 2018 (eigenvalue correction).
    """
    check_positive_int(num_samples, "num_samples")
    check_fallback(fallback)
    check_not_negative(weights)
    check_weight_sharing(weight_sharing)
    if targets is not None and key is not None:
        raise ValueError("targets, key: kfac takes one of the two, got both.")
    keys = None if key is None else jax.random.split(key, num_samples)
    data = {"targets": targets, "weights": weights, "keys": keys, "batch_axes": batch_axes}
    problem = Problem.of(model_fn, head, params, batch, **data)
    kind = FisherCurvature if targets is None else EmpiricalCurvature
    return kfac_of(
        problem,
        kind if key is None else SampledCurvature,
        weight_sharing=weight_sharing,
        eigenvalue_corrected=eigenvalue_corrected,
        fallback=fallback,
    )


def check_weight_sharing(weight_sharing: str) -> None:
    """Raises unless there is such a way."""
    if weight_sharing not in WEIGHT_SHARING:
        expected = " or ".join(map(repr, WEIGHT_SHARING))
        raise ValueError(f"weight_sharing: expected {expected}, got {weight_sharing!r}.")


@compiled_when_eager
def kfac_of(problem: Problem, kind: type[OutputCurvature], **options: Any) -> KFAC:
    """The factors of the curvature ``kind``; options as in `kfac`."""
    return auto_sharded(functools.partial(_factored, kind, **options), problem)


def _factored(
    kind: type[OutputCurvature],
    problem: Problem,
    *,
    weight_sharing: str = "expand",
    eigenvalue_corrected: bool = False,
    fallback: str | None = None,
) -> KFAC:
    captured = capture_batch(problem, kind, fallback)
    plans, unhandled = plans_of(captured, fallback)
    blocks = kronecker_blocks(captured, plans, weight_sharing == "reduce")
    if eigenvalue_corrected:
        blocks = with_corrected_eigenvalues(captured, plans, blocks)
    diagonals = differentiated(problem, captured, sorted(unhandled))
    template = (captured.layers.structure, captured.layers.shapes)
    return KFAC(tuple(blocks), diagonals, template, coverage_of(captured.layers, unhandled))
