"""The z-space step of each curvature: what stands between J v and J^T u.

A metric is a pytree called as ``metric(u)``; it applies an (event x event) matrix to ``u`` for each
example, in float32 or wider, without the example's weight. A new curvature of the form
E[J^T H J] is one more function ``(head, z, examples) -> metric`` in this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from fvp.heads import Head
from fvp.mesh import auto_sharded, row_axes, shard_rows
from fvp.numerics import widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """What a curvature reads of its examples beside the model's input.

    Attributes:
      targets: the data's labels, or None for curvatures that do not use them.
      weights: one weight for each example, broadcastable to the batch axes, or None.
      keys: (S,) random keys, one for each Monte Carlo sample, or None.
      indices: (N,) position of each row in the batch, or None for rows in order.
      shard: number of the device's part, where the batch is split over a named axis, or None.
    """

    targets: Any = None
    weights: Any = None
    keys: Any = None
    indices: Any = None
    shard: Any = None


def example_indices(count: int, shard: Any) -> Array:
    """Positions of ``count`` rows in the whole batch, of which they are part number ``shard``."""
    return jnp.arange(count) + (0 if shard is None else shard * count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherMetric:
    """F_R(z) u: the Fisher of the output distribution under its own labels."""

    head: Head
    z: Array

    def __call__(self, u: Array) -> Array:
        return self.head.fisher(self.z, u)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianMetric:
    """The Hessian of the negative log-likelihood in z, times u."""

    head: Head
    z: Array
    targets: Array

    def __call__(self, u: Array) -> Array:
        return self.head.hessian(self.z, self.targets, u)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreMetric:
    """(1/S) sum_s score_s (score_s . u), for S scores per example on a leading axis."""

    scores: Array
    event_ndim: int = dataclasses.field(metadata={"static": True})

    def __call__(self, u: Array) -> Array:
        axes = tuple(range(-self.event_ndim, 0))
        projections = jnp.sum(self.scores * u, axis=axes, keepdims=True)
        return jnp.mean(self.scores * projections, axis=0)


def fisher_metric(head: Head, z: Array, examples: Examples) -> FisherMetric:
    """True Fisher: the expectation over the model's own labels, in closed form."""
    del examples
    return FisherMetric(head, widen(z))


def ggn_metric(head: Head, z: Array, examples: Examples) -> HessianMetric:
    """Generalised Gauss-Newton: the Hessian of the loss in z, at the data's targets."""
    return HessianMetric(head, widen(z), head.check_targets(z, examples.targets))


def empirical_metric(head: Head, z: Array, examples: Examples) -> ScoreMetric:
    """Empirical Fisher: the outer product of the score at the data's own targets."""
    return ScoreMetric(head.score(widen(z), examples.targets)[None], head.event_ndim)


def monte_carlo_metric(head: Head, z: Array, examples: Examples) -> ScoreMetric:
    """Monte Carlo Fisher: scores at labels drawn from the model, once, when the metric is built.

    Each example draws from keys of its own, made from its index, so that the matrix depends neither
    on the size of the chunks nor on how the batch is sharded.
    """
    indices = examples.indices
    if indices is None:
        indices = shard_rows(example_indices(z.shape[0], examples.shard), row_axes(z))

    def score(key: Array, index: Array, row: Array) -> Array:
        # Heads want a batch axis; a row of (B, C) outputs has none left.
        sample = head.sample(jax.random.fold_in(key, index), row[None])
        return head.score(row[None], sample)[0]

    per_example = jax.vmap(score, in_axes=(None, 0, 0))
    per_sample = jax.vmap(per_example, in_axes=(0, None, None))
    # Up to jax 0.9 a vmapped draw knows nothing of Explicit axes.
    spec = PartitionSpec(None, *getattr(jax.typeof(z).sharding, "spec", ()))
    scores = auto_sharded(per_sample, examples.keys, indices, widen(z), specs=spec)
    return ScoreMetric(scores, head.event_ndim)
