"""Line searches over step lengths: on the linearised outputs, and on the true loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

HALVINGS, FURTHER = 20, 100  # docs/decisions/steps.md


def halving_search(loss: Callable[[Array], Array], before: Array) -> tuple[Array, Array]:
    """The length among 1, 1/2, 1/4, ... before the loss rises again, and its loss.

    Lengths are halved until the loss is below ``before`` and half the length would make it larger:
    mostly two evaluations of ``loss(length)``. Values that are not finite count as infinite. Where
    nothing down to 2^-20 is below ``before``, sixteenths are taken, to 2^-100: the step is then far
    too long, as where the curvature vanishes. Where nothing is below ``before``, the best of all.
    """

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        length, _, best, better = carry
        return ((best >= before) | better) & (length > 2.0**-FURTHER)

    def halve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        length, at, best, _ = carry
        far = (best >= before) & (length <= 2.0**-HALVINGS)
        length = jnp.where(far, 0.0625, 0.5) * length
        value = loss(length).astype(before.dtype)
        value = jnp.where(jnp.isfinite(value), value, jnp.inf)
        better = value <= best  # of equal ones the shortest: a flat loss says nothing of length
        return length, jnp.where(better, length, at), jnp.where(better, value, best), better

    # From twice the whole length: a first evaluation of its own would be compiled a second time.
    two = jnp.full((), 2, jnp.float32)
    start = two, two, jnp.full_like(before, jnp.inf), jnp.array(True)
    _, length, best, _ = jax.lax.while_loop(unfinished, halve, start)
    return length, best


def output_search(
    loss: Callable[[Array], Array], output: Array, change: Array, before: Array
) -> tuple[Array, Array]:
    """The same search with the local model z - length * J d in place of the network.

    One JVP, ``change`` = J d, serves all lengths: the model itself is not evaluated.

    Args:
      loss: ``loss(z)``, the mean loss of outputs like ``output``.
      output: z at the parameters.
      change: J d for the direction d that is subtracted.
      before: the loss at ``output``.
    """
    return halving_search(lambda a: loss(output - a.astype(output.dtype) * change), before)
