"""The diagonal of the Fisher, by layer rules."""

from __future__ import annotations

import math
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
from fvp.layers.capture import Capture, capture
from fvp.layers.columns import columns_of
from fvp.layers.groups import Rows, groups_of, input_size, to_leaf
from fvp.layers.products import einsum
from fvp.layers.report import check_covered, check_fallback
from fvp.layers.uses import Use
from fvp.numerics import cast_like, widen

_CHUNK = 2**25  # entries of per-example gradients, or of cotangents, that are held at a time


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
      >>> print(fvp.fisher_diagonal(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x))
      [[ 5.]
       [10.]]

    Reference:
      F. Dangel, F. Kunstner, P. Hennig, BackPACK: Packing more into backprop, 2020.
    """
    check_positive_int(num_samples, "num_samples")
    check_fallback(fallback)
    params = check_inexact_tree(params, "params")
    axes, structure = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
    static = (structure, tuple(axes))
    return _diagonal(model_fn, num_samples, static, fallback, head, params, batch, weights, key)


@compiled_when_eager
def _diagonal(
    model_fn: Any,
    num_samples: int,
    axes: Any,
    fallback: str | None,
    head: Head,
    params: Any,
    batch: Any,
    weights: Any,
    key: Any,
) -> Any:
    layers = capture(model_fn, head, params, batch, jax.tree.unflatten(*axes))
    check_covered(layers, fallback)
    keys = None if key is None else jax.random.split(key, num_samples)
    everywhere = range(len(layers.batch_shape))
    apart = [axis for axis in everywhere if axis not in layers.examples]
    columns = columns_of(head, layers.z, weights, apart, keys=keys)
    shares = jnp.sum(columns.shares, axis=tuple(apart)).ravel()
    groups = groups_of(layers)
    used = [[layers.uses[number] for number in group] for group in groups]
    inputs = [[_present(layers.inputs[number], shares) for number in group] for group in groups]

    def squares(cotangents: Array) -> list[Array]:
        outputs = layers.outputs(cotangents)
        total = [jnp.zeros(s.shape, widen(layers.z).dtype) for s in layers.shapes]
        for group, uses, xs in zip(groups, used, inputs, strict=True):
            deltas = [_present(outputs[number], shares, 1) for number in group]
            total[uses[0].view.leaf] += _squared(Rows(tuple(uses), tuple(xs), tuple(deltas)))
        return total

    total = columns.sum(squares, _columns_at_a_time(layers))
    lost = sorted({use.view.leaf for use in layers.lost})
    if lost:
        rows = columns_of(head, layers.z, weights, everywhere, keys=keys)
        plain = _squared_rows(model_fn, params, batch, rows, lost)
        for leaf, value in zip(lost, plain, strict=True):
            total[leaf] = value
    return cast_like(layers.unflatten(total), params)


def _present(x: Any, shares: Array, axis: int = 0) -> Any:
    """``x`` with the examples of weight zero, whatever they hold, replaced by zeros."""
    if x is None or shares.size == 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where((shares == 0).reshape(-1, *(1,) * (x.ndim - axis - 1)), 0, widen(x))


def _columns_at_a_time(layers: Capture) -> int:
    largest = max((math.prod(use.shape) for use in layers.uses), default=1)
    return max(1, _CHUNK // largest)


def _squared(rows: Rows) -> Array:
    """The sum over columns and examples of the squared gradient with respect to the leaf."""
    use, x, delta = rows.uses[0], rows.inputs[0], rows.outputs[0]
    if len(rows.uses) > 1 or use.view.mixes:
        return _squared_gradients(rows)
    if use.kind == "lookup":
        return to_leaf(use, _squared_lookup(use, x, delta))
    if x is None:  # the gradient itself
        return to_leaf(use, jnp.sum(delta**2, axis=(0, 1, 2))[:, None, :])
    if delta.shape[2] > 1:
        return _squared_gradients(rows)
    power = jnp.sum(delta**2, axis=0)
    return to_leaf(use, einsum("ergi,ergo->gio", x**2, power))


def _squared_lookup(use: Use, x: Array, delta: Array) -> Array:
    """Rows of one example that look up the same entry are added up before they are squared."""
    if delta.shape[2] > 1:
        same = (x[:, :, None] == x[:, None]).astype(delta.dtype)  # (E, R, R, G)
        delta = einsum("ersg,kesgo->kergo", same, delta) / jnp.sqrt(same.sum(2))[None, ..., None]
    power = jnp.sum(delta**2, axis=0)
    size = input_size(use)

    def scatter(index: Array, power: Array) -> Array:
        return jnp.zeros((size, power.shape[-1]), power.dtype).at[index].add(power, mode="drop")

    groups = power.shape[2]
    power = jnp.moveaxis(power, 2, 0).reshape(groups, -1, power.shape[-1])
    return jax.vmap(scatter)(jnp.moveaxis(x, 2, 0).reshape(groups, -1), power)


def _squared_gradients(rows: Rows) -> Array:
    """Through the per-example gradients themselves, a few examples at a time."""
    examples = rows.outputs[0].shape[1]
    gradient = jax.eval_shape(rows.gradients)
    size = max(1, _CHUNK // max(1, math.prod(gradient.shape) // examples))

    def some(data: Any) -> Array:
        xs, deltas = data
        deltas = tuple(jnp.moveaxis(d, 0, 1) for d in deltas)
        return jnp.sum(Rows(rows.uses, xs, deltas).gradients() ** 2, axis=(0, 1))

    data = (rows.inputs, tuple(jnp.moveaxis(d, 1, 0) for d in rows.outputs))
    if size >= examples:
        return some(data)
    padding = -examples % size
    pad = lambda a: jnp.concatenate([a, jnp.zeros((padding, *a.shape[1:]), a.dtype)])
    data = jax.tree.map(lambda a: pad(a).reshape(-1, size, *a.shape[1:]), data)
    zero = jnp.zeros(gradient.shape[2:], gradient.dtype)
    return jax.lax.scan(lambda total, part: (total + some(part), None), zero, data)[0]


def _squared_rows(model_fn: Any, params: Any, batch: Any, rows: Any, lost: list[int]) -> Any:
    """One backward pass for every row and column, for the leaves without a layer rule."""
    leaves, structure = jax.tree.flatten(params)

    def model(some: Any) -> Array:
        whole = list(leaves)
        for leaf, value in zip(lost, some, strict=True):
            whole[leaf] = value
        return model_fn(jax.tree.unflatten(structure, whole), batch)

    some = [leaves[leaf] for leaf in lost]
    linearization = Linearization.of(model, some)
    dtype = linearization.output.dtype

    def squares(cotangents: Array) -> Any:
        gradients = jax.vmap(lambda u: linearization.vjp(u.astype(dtype)))(cotangents)
        return jax.tree.map(lambda g: jnp.sum(widen(g) ** 2, axis=0), gradients)

    return rows.sum(squares, max(1, _CHUNK // max(leaf.size for leaf in some)))
