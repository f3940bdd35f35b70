"""The diagonal of the Fisher, by layer rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature.linearization import Linearization
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.layers.captured_batch import CHUNK, LayerRows, layer_rows
from fvp.layers.columns import check_not_negative, columns_of
from fvp.layers.groups import Rows
from fvp.layers.squares import squared
from fvp.mesh import auto_sharded
from fvp.model import close_model
from fvp.numerics import cast_like, widen
from fvp.tracing.coverage import check_fallback


def fisher_diagonal(
    model_fn: Callable[[Any, Any], Array],
    head: Head,
    params: Any,
    batch: Any,
    *,
    weights: ArrayLike | None = None,
    key: Array | None = None,
    num_samples: int = 1,
    batch_axes: Any = 0,
    fallback: str | None = None,
) -> Any:
    r"""The diagonal of the Fisher, diag F = sum_i w_i sum_c (J_i^T s_ic)^2 / sum_i w_i.

    The s_ic are the columns of S(z_i), S S^T = F_R; with a ``key``, scores at labels drawn from the
    model. One forward pass records the inputs x of every layer, one backward pass per column the
    cotangents d of its outputs, and the squares of the per-example gradients are
    (sum_c d_c^2)^T x^2 where a weight is used once per example; no per-example gradient is formed.
    Where it is shared (convolutions, tokens, time steps) they are summed a few examples at a time.

    The cost is a forward pass, and C backward passes without their weight gradients (one with a
    ``key``). Rows that meet inside one example (tokens of an attention layer) take C passes each:
    prefer a ``key`` for long sequences.

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
        examples (batch normalisation in training): exact, at the cost of rows x columns passes.

    Returns:
      A pytree like ``params``, computed in float32 or wider and returned in the dtypes of
      ``params``.

    Raises:
      ValueError: naming parameter and primitive, where a parameter is used in a way that has no
        layer rule, or examples are mixed, and no fallback was asked for.

    Example:
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
    check_head(head)
    params = check_inexact_tree(params, "params")
    model_fn, batch = close_model(model_fn, batch)
    axes, structure = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
    static = ((structure, tuple(axes)), num_samples, fallback)
    return _diagonal(model_fn, static, head, params, batch, weights, key)


@compiled_when_eager
def _diagonal(model_fn: Any, static: Any, head: Head, params: Any, *data: Any) -> Any:
    return auto_sharded(
        functools.partial(_squares, model_fn, static), head, params, *data, like=params
    )


def _squares(
    model_fn: Any,
    static: Any,
    head: Head,
    params: Any,
    batch: Any,
    weights: Any,
    key: Any,
) -> Any:
    axes, num_samples, fallback = static
    keys = None if key is None else jax.random.split(key, num_samples)
    batch_axes = jax.tree.unflatten(*axes)
    captured = layer_rows(model_fn, head, params, batch, weights, batch_axes, fallback, keys=keys)
    layers = captured.layers

    def squares(groups: list[Rows]) -> list[Array]:
        total = [jnp.zeros(s.shape, widen(layers.z).dtype) for s in layers.shapes]
        for rows in groups:
            leaf = rows.uses[0].view.leaf
            total[leaf] += squared(rows, layers.shapes[leaf].shape)
        return total

    total = captured.sum(squares)
    for leaf, value in squared_rows(
        model_fn, head, params, batch, weights, captured, captured.lost, keys=keys
    ).items():
        total[leaf] = value
    return cast_like(layers.unflatten(total), params)


def squared_rows(
    model_fn: Any,
    head: Head,
    params: Any,
    batch: Any,
    weights: Any,
    captured: LayerRows,
    lost: list[int],
    **options: Any,
) -> dict[int, Array]:
    """The diagonal of the leaves ``lost``, by one backward pass for every row and column."""
    if not lost:
        return {}
    everywhere = range(len(captured.layers.batch_shape))
    columns = columns_of(head, captured.layers.z, weights, everywhere, **options)
    leaves, structure = jax.tree.flatten(params)

    def model(some: list[Any]) -> Array:
        whole = list(leaves)
        for leaf, value in zip(lost, some, strict=True):
            whole[leaf] = value
        return model_fn(jax.tree.unflatten(structure, whole), batch)

    linearization = Linearization.of(model, [leaves[leaf] for leaf in lost])
    dtype = linearization.output.dtype

    def squares(cotangents: Array) -> list[Array]:
        gradients = jax.vmap(lambda u: linearization.vjp(u.astype(dtype)))(cotangents)
        return [jnp.sum(widen(g) ** 2, axis=0) for g in gradients]

    size = max(1, CHUNK // max(leaves[leaf].size for leaf in lost))
    return dict(zip(lost, columns.sum(squares, size), strict=True))
