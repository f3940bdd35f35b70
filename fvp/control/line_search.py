"""Line searches over step lengths: on the linearised outputs, and on the true loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def grid_search(loss: Callable[[Array], Array], halvings: int = 10) -> tuple[Array, Array]:
    """The best of the lengths 1, 1/2, ..., 2^-halvings, and its loss.

    ``loss(length)`` is evaluated one length at a time; values that are not finite lose.
    """
    lengths = 2.0 ** -jnp.arange(halvings + 1, dtype=jnp.float32)
    losses = jax.lax.map(loss, lengths)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    best = jnp.argmin(losses)
    return lengths[best], losses[best]


def output_search(
    loss: Callable[[Array], Array], output: Array, change: Array, halvings: int = 10
) -> tuple[Array, Array]:
    """The same search with the local model z - length * J d in place of the network.

    One JVP, ``change`` = J d, serves all lengths: the model itself is not evaluated.

    Args:
      loss: ``loss(z)``, the mean loss of outputs like ``output``.
      output: z at the parameters.
      change: J d for the direction d that is subtracted.
      halvings: exponent of the shortest length.
    """
    return grid_search(lambda a: loss(output - a.astype(output.dtype) * change), halvings)
