"""Statistics of BatchNorm layers, estimated at the parameters as they are.

A layer keeps averages over the batches of training for the evaluation. After long steps they belong
to parameters that are gone: training loss and evaluation loss part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fvp.numerics import cast_like
from fvp.typing import PyTree


def mean_statistics(
    update: Callable[[PyTree, Any], PyTree], like: PyTree, batches: Iterable[Any]
) -> PyTree:
    """The mean over ``batches`` of what a training pass adds to running averages.

    ``update(averages, batch)`` are the averages after a pass, m averages + (1 - m) new: they are
    asked for from zeros and from ones, which tells m and the new ones apart, to the digits of
    1 - m: five where m is 0.99 in float32. The model's outputs depend on neither, so that the
    compiler makes one pass of both.

    Args:
      update: the training pass.
      like: the averages, for shapes and dtypes.
      batches: at least one; each counts the same.

    Raises:
      ValueError: without batches, or where a pass leaves the averages as they are.
    """

    @jax.jit
    def new(batch: Any) -> tuple[PyTree, Any]:
        fill = lambda value: jax.tree.map(lambda x: jnp.full_like(x, value), like)
        zeros, ones = update(fill(0), batch), update(fill(1), batch)
        part = jax.tree.map(lambda a, b: 1 - (b - a), zeros, ones)
        moved = [jnp.all(x > 0) for x in jax.tree.leaves(part)]
        return jax.tree.map(jnp.divide, zeros, part), jnp.all(jnp.asarray(moved))

    total, count = None, 0
    for batch in batches:
        statistics, moved = new(batch)
        if not moved:
            raise ValueError(
                "batches: a pass leaves the running averages as they are; the model has to be in"
                " training mode, with a momentum below 1."
            )
        total = statistics if total is None else jax.tree.map(jnp.add, total, statistics)
        count += 1
    if total is None:
        raise ValueError("batches: expected at least one, got none.")
    return cast_like(jax.tree.map(lambda x: x / count, total), like)
