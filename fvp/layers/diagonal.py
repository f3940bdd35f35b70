"""The diagonal of the Fisher, by layer rules."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature import FisherCurvature, OutputCurvature, Problem, SampledCurvature
from fvp.curvature.linearization import Linearization
from fvp.heads import Head
from fvp.layers.captured_batch import CapturedBatch, capture_batch
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import check_not_negative
from fvp.layers.groups import GroupGradients
from fvp.layers.squares import squared
from fvp.mesh import auto_sharded
from fvp.numerics import cast_like, widen, zeros_of
from fvp.tracing.coverage import check_fallback
from fvp.typing import Batch, ModelFn, Params, PyTree


def fisher_diagonal(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    *,
    weights: ArrayLike | None = None,
    key: Array | None = None,
    num_samples: int = 1,
    batch_axes: PyTree = 0,
    fallback: str | None = None,
) -> Params:
    r"""The diagonal of the Fisher, diag F = sum_i w_i sum_c (J_i^T s_ic)^2 / sum_i w_i.

    The s_ic are the columns of S(z_i), S S^T = F_R; with a ``key``, scores at labels drawn from the
    model. One forward pass records the inputs x of every layer, one backward pass per column the
    cotangents d of its outputs, and the squares of the per-example gradients are
    (sum_c d_c^2)^T x^2 where a weight is used once per example; no per-example gradient is formed.
    Where it is shared (convolutions, tokens, time steps) they are summed a few examples at a time.

    The cost is a forward pass, and C backward passes without their weight gradients (one with a
    ``key``). Outputs that meet inside an example (tokens of an attention layer) take C passes each,
    so prefer a ``key`` for long sequences.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      params: pytree of floating-point arrays.
      batch: pytree that ``model_fn`` reads.
      weights: one weight per example, shape = batch axes of z or broadcastable to it.
      key: a ``jax.random`` key for the unbiased Monte Carlo estimate; None is exact.
      num_samples: labels drawn for each example with a ``key``.
      batch_axes: where the example axis of each leaf of ``batch`` is, in the form of the
        ``in_axes`` of ``jax.vmap``.
      fallback: "per_example" differentiates row by row what has no layer rule, and models that mix
        examples (batch normalisation in training): exact, at the cost of a pass for each output
        of each example.

    Returns:
      A pytree like ``params``, computed in float32 or wider and returned in the dtypes of
      ``params``.

    Raises:
      ValueError: naming parameter and primitive, where a parameter is used in a way that has no
        layer rule, or examples are mixed, and no fallback was asked for.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> diagonal = fvp.fisher_diagonal(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print(diagonal.round(3))
      [[ 5.]
       [10.]]

    Reference:
      F. Dangel, F. Kunstner, P. Hennig, BackPACK: Packing more into backprop, 2020.
    """
    check_positive_int(num_samples, "num_samples")
    check_fallback(fallback)
    check_not_negative(weights)
    data = {"weights": weights, "batch_axes": batch_axes}
    problem = Problem.of(model_fn, head, params, batch, **data)
    if key is None:
        return diagonal_of(problem, FisherCurvature, fallback)
    problem = dataclasses.replace(problem, keys=jax.random.split(key, num_samples))
    return diagonal_of(problem, SampledCurvature, fallback)


@compiled_when_eager
def diagonal_of(
    problem: Problem, kind: type[OutputCurvature], fallback: str | None = None
) -> Params:
    """The diagonal of the curvature ``kind``, see `fisher_diagonal`."""
    function = functools.partial(_squares, kind, fallback)
    return auto_sharded(function, problem, like=problem.params)


def _squares(kind: type[OutputCurvature], fallback: str | None, problem: Problem) -> Params:
    captured = capture_batch(problem, kind, fallback)
    layers = captured.layers
    dtype = widen(layers.z).dtype

    def squares(groups: list[GroupGradients]) -> list[Array]:
        total = zeros_of([jax.ShapeDtypeStruct(s.shape, dtype) for s in layers.shapes])
        for group in groups:
            total[group.leaf] += squared(group, layers.shapes[group.leaf].shape)
        return total

    total = captured.sum(squares)
    for leaf, value in differentiated(problem, captured, captured.unmatched).items():
        total[leaf] = value
    return cast_like(layers.unflatten(total), problem.params)


def differentiated(
    problem: Problem, captured: CapturedBatch, numbers: list[int]
) -> dict[int, Array]:
    """The diagonal of the leaves with these numbers, by one backward pass for every column.

    No column is shared: each entry of the batch axes of z has columns of its own.
    """
    if not numbers:
        return {}
    columns = captured.make_columns(tuple(range(len(captured.layers.batch_shape))))
    leaves, structure = jax.tree.flatten(problem.params)

    def model(some: list[Array]) -> Array:
        whole = list(leaves)
        for number, value in zip(numbers, some, strict=True):
            whole[number] = value
        return problem.outputs(jax.tree.unflatten(structure, whole))

    linearization = Linearization.of(model, [leaves[number] for number in numbers])
    dtype = linearization.output.dtype

    def squares(cotangents: Array) -> list[Array]:
        gradients = jax.vmap(lambda u: linearization.vjp(u.astype(dtype)))(cotangents)
        return [jnp.sum(widen(g) ** 2, axis=0) for g in gradients]

    size = max(1, CHUNK // max(leaves[number].size for number in numbers))
    return dict(zip(numbers, columns.sum(squares, size), strict=True))
