"""Cotangents in the space of outputs whose outer products sum to the metric of a curvature.

A curvature is sum_k J^T c_k c_k^T J over columns c_k. Where the model keeps its rows apart, one
column serves all of them at once; where rows meet, each row has columns of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fvp.curvature.metrics import (
    Examples,
    FisherMetric,
    HessianMetric,
    ScoreMetric,
    monte_carlo_metric,
)
from fvp.curvature.pieces import example_weights, mask_outputs, total_weight
from fvp.heads import Head, Softmax
from fvp.numerics import widen


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one batch; lives inside one trace.

    Attributes:
      number: how many there are.
      shares: w_i / sum w over the batch axes of z.
      make: index -> the column, an array like z.
    """

    number: int
    shares: Array
    make: Callable[[Any], Array]

    def all(self) -> Array:
        """(K, like z)."""
        return jax.vmap(self.make)(jnp.arange(self.number))

    def sum(self, function: Callable[[Array], Any], size: int) -> Any:
        """The sum over chunks of ``size`` columns of ``function(columns)``."""
        if self.number <= size:
            return function(self.all())
        indices = jnp.arange(-(-self.number // size) * size).reshape(-1, size)

        def chunk(indices: Array) -> Any:
            columns = jax.vmap(self.make)(indices)
            beyond = (indices >= self.number).reshape(-1, *(1,) * (columns.ndim - 1))
            return function(jnp.where(beyond, 0, columns))

        def step(total: Any, indices: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, chunk(indices)), None

        shapes = jax.eval_shape(chunk, indices[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(step, zeros, indices)[0]


def check_not_negative(weights: Any) -> None:
    """Raises for negative weights where their values are known: their square roots are none."""
    if weights is None or isinstance(weights, Tracer):
        return
    if np.min(np.asarray(weights), initial=0) < 0:
        raise ValueError(
            "weights: fisher_diagonal, kfac and solve_dual expect 0 or more, got"
            f" {np.min(np.asarray(weights))}; products and fvp.cg take negative ones."
        )


def exact_root(head: Head, z: Array) -> tuple[int, Callable[[Any], Array]]:
    """Columns of outer products F_R: those of S, S S^T = F_R; for Softmax one less.

    Softmax has S sqrt(p) = 0: the columns are those of S H with the reflection H that takes the
    last unit vector to -sqrt(p), and the last is zero.
    """
    event = z.shape[z.ndim - head.event_ndim :]
    size, singular = math.prod(event), isinstance(head, Softmax)

    def column(index: Any) -> Array:
        unit = (jnp.arange(size) == index).astype(z.dtype).reshape(event)
        w = jnp.broadcast_to(unit, z.shape)
        if singular:
            last = (jnp.arange(size) == size - 1).astype(z.dtype)
            w -= jnp.sum(_reflection(head, z) * unit, axis=-1, keepdims=True) * last
        return head.sqrt_fisher(z, w)

    return size - singular, column


def exact_root_coefficients(head: Head, z: Array, w: Array) -> Array:
    """The coefficients of S w in the columns of :func:`exact_root`."""
    if not isinstance(head, Softmax):
        return w
    along = jnp.sum(jnp.sqrt(head.mean(z)) * w, axis=-1, keepdims=True) + w[..., -1:]
    return (w - _reflection(head, z) * along)[..., :-1]


def _reflection(head: Head, z: Array) -> Array:
    """v_k / v_C for k < C, where v = sqrt(p) + e_C and H = I - v v^T / v_C."""
    root = jnp.sqrt(head.mean(z))
    return root / (1 + root[..., -1:])


def score_root(scores: Array) -> tuple[int, Callable[[Any], Array]]:
    """The columns of mean_s score_s score_s^T, for scores (S, like z)."""
    count = scores.shape[0]
    return count, lambda index: jnp.take(scores, index, axis=0, mode="clip") / math.sqrt(count)


def columns_of(
    head: Head,
    z: Array,
    weights: Any,
    separate: Sequence[int],
    *,
    targets: Any = None,
    keys: Any = None,
) -> Columns:
    """The columns of the mean curvature: exact, Monte Carlo with ``keys``, empirical with targets.

    ``separate`` are the batch axes along which every row has columns of its own. Sampled scores are
    independent with mean zero, so that rows that share a column do not meet in expectation.
    """
    counts = head.batch_shape(z)
    weights = example_weights(head, z, weights)
    z = widen(mask_outputs(weights, head.event_ndim, z))
    total = total_weight(weights, z, counts, None)
    shares = (jnp.ones(counts, total.dtype) if weights is None else weights) / total
    if keys is not None:
        size, root = score_root(monte_carlo_metric(head, z, Examples(keys=keys)).scores)
        separate = ()
    elif targets is not None:
        size, root = score_root(head.score(z, targets)[None])
    else:
        size, root = exact_root(head, z)
    return separated(size, root, shares, separate, head.event_ndim)


def has_root(metric: Any) -> bool:
    """Whether the columns of a metric are known: of scores, of F_R and of its multiples."""
    if isinstance(metric, HessianMetric):
        return type(metric.head)._hessian is Head._hessian
    return isinstance(metric, ScoreMetric | FisherMetric)


def metric_columns(piece: Any, total: Array, separate: Sequence[int]) -> Columns:
    """The columns of a Gauss-Newton piece whose examples weigh ``total``, from its own metric."""
    head, metric, z = piece.head, piece.metric, piece.output
    counts = head.batch_shape(z)
    weights = jnp.ones(counts, total.dtype) if piece.weights is None else piece.weights
    if isinstance(metric, ScoreMetric):
        size, root = score_root(metric.scores)
    else:
        size, root = exact_root(head, metric.z)
        if (factor := multiple_of_fisher(metric)) is not None:
            weights = jnp.where(weights == 0, 0, factor * weights)
    return separated(size, root, weights / total, separate, head.event_ndim)


def multiple_of_fisher(metric: Any) -> Array | None:
    """The c of each example with H = c F_R; None where it is 1."""
    if not isinstance(metric, HessianMetric):
        return None
    return metric.head.hessian_factor(metric.z, metric.targets)


def separated(
    size: int,
    root: Callable[[Any], Array],
    shares: Array,
    separate: Sequence[int],
    event_ndim: int,
) -> Columns:
    """The columns ``root``, weighted, one copy for each row along the axes ``separate``."""
    counts = shares.shape
    shape = tuple(counts[axis] for axis in separate)
    scale = jnp.sqrt(shares).reshape(*counts, *(1,) * event_ndim)

    def make(index: Any) -> Array:
        # A row of weight zero is not there, whatever it holds.
        column = jnp.where(scale == 0, 0, scale * root(index % size))
        row = jnp.unravel_index(index // size, shape) if shape else ()
        for axis, position in zip(separate, row, strict=True):
            here = jnp.arange(counts[axis]) == position
            column = jnp.where(here.reshape(-1, *(1,) * (column.ndim - axis - 1)), column, 0)
        return column

    return Columns(math.prod(shape) * size, shares, make)
