"""A batch, captured: the rows of every group of uses, for the columns of a curvature."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.heads import Head
from fvp.layers.columns import Columns, columns_of
from fvp.layers.groups import Rows, groups_of
from fvp.numerics import widen
from fvp.tracing.capture import Capture, capture
from fvp.tracing.coverage import check_covered

CHUNK = 2**25  # entries of per-example gradients, or of cotangents, that are held at a time


@dataclasses.dataclass(frozen=True)
class LayerRows:
    """Lives inside one trace.

    Attributes:
      layers: the capture.
      columns: the cotangents; where rows meet inside an example each has columns of its own.
      shares: (E,) share of each example in the total weight.
      groups: numbers of the uses that belong together.
      separate: the batch axes whose rows have columns of their own.
      inputs: of each use, as in the capture; zeros where an example has no weight.
    """

    layers: Capture
    columns: Columns
    shares: Array
    groups: tuple[tuple[int, ...], ...]
    separate: tuple[int, ...]
    inputs: tuple[Any, ...]

    def rows(self, cotangents: Array) -> list[Rows]:
        """One set of rows for each group, for cotangents (K, like z)."""
        outputs = self.layers.outputs(cotangents)
        sets = []
        for group in self.groups:
            uses = tuple(self.layers.uses[number] for number in group)
            inputs = tuple(self.inputs[number] for number in group)
            deltas = tuple(_present(outputs[number], self.shares, 1) for number in group)
            sets.append(Rows(uses, inputs, deltas))
        return sets

    def sum(self, function: Callable[[list[Rows]], Any]) -> Any:
        """The sum over the columns, a few at a time, of ``function(rows)``."""
        largest = max((math.prod(use.shape) for use in self.layers.uses), default=1)
        return self.columns.sum(lambda c: function(self.rows(c)), max(1, CHUNK // largest))

    @property
    def lost(self) -> list[int]:
        """The leaves that some use without a layer rule reads."""
        return sorted({use.view.leaf for use in self.layers.lost})


def layer_rows(
    model_fn: Callable[[Any, Any], Array],
    head: Head,
    params: Any,
    batch: Any,
    weights: Any,
    batch_axes: Any,
    fallback: str | None,
    *,
    targets: Any = None,
    keys: Any = None,
) -> LayerRows:
    """Captures ``model_fn`` at ``batch`` and chooses the columns."""
    layers = capture(model_fn, head, params, batch, batch_axes)
    check_covered(layers, fallback)
    make = lambda separate: columns_of(
        head, layers.z, weights, separate, targets=targets, keys=keys
    )
    return rows_of_capture(layers, make)


def rows_of_capture(
    layers: Capture, make_columns: Callable[[tuple[int, ...]], Columns]
) -> LayerRows:
    """The rows of a capture for columns ``make_columns(separate)``."""
    axes = range(len(layers.batch_shape))
    separate = tuple(axis for axis in axes if axis not in layers.examples)
    columns = make_columns(separate)
    shares = jnp.sum(columns.shares, axis=separate).ravel()
    inputs = tuple(_present(x, shares) for x in layers.inputs)
    groups = tuple(groups_of(layers))
    return LayerRows(layers, columns, shares, groups, separate, inputs)


def _present(x: Any, shares: Array, axis: int = 0) -> Any:
    """``x`` with the examples of weight zero, whatever they hold, replaced by zeros."""
    if x is None or shares.size == 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where((shares == 0).reshape(-1, *(1,) * (x.ndim - axis - 1)), 0, widen(x))


def scan_examples(function: Callable[[Any], Any], data: Any, size: int) -> Any:
    """The sum of ``function`` over chunks of ``size`` examples, the first axis of ``data``."""
    examples = jax.tree.leaves(data)[0].shape[0]
    if size >= examples:
        return function(data)
    padding = -examples % size

    def split(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
        return x.reshape(-1, size, *x.shape[1:])

    data = jax.tree.map(split, data)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], data))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    step = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)
    return jax.lax.scan(step, zeros, data)[0]
