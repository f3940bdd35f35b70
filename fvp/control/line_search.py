"""Line searches over step lengths: on the linearised outputs, and on the true loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import tree_where

HALVINGS, FURTHER = 20, 100  # docs/decisions/steps.md


def halving_search(
    loss: Callable[[Array], tuple[Array, Any]], before: Array, start: Any = None
) -> tuple[Array, Array, Any]:
    """The length among 1, 1/2, 1/4, ... before the loss rises again, and its loss.

    Lengths are halved until the loss is below ``before`` and half the length would make it larger:
    mostly two evaluations of ``loss(length)``. Values that are not finite count as infinite. Where
    nothing down to 2^-20 is below ``before``, sixteenths are taken, to 2^-100: the step is then far
    too long, as where the curvature vanishes. Where nothing is below ``before``, the best of all.

    What ``loss`` gives beside the value, a tree like ``start``, is returned too; ``start`` itself
    where no value was finite.
    """

    class State(NamedTuple):
        length: Array  # the last that was tried
        at: Array  # the best
        best: Array  # its loss
        beside: Any  # and what came with it
        better: Array  # whether the last was the best

    def unfinished(state: State) -> Array:
        return ((state.best >= before) | state.better) & (state.length > 2.0**-FURTHER)

    def halve(state: State) -> State:
        far = (state.best >= before) & (state.length <= 2.0**-HALVINGS)
        length = jnp.where(far, 0.0625, 0.5) * state.length
        value, beside = loss(length)
        value = value.astype(before.dtype)
        value = jnp.where(jnp.isfinite(value), value, jnp.inf)
        better = value <= state.best  # of equal ones the shortest: a flat loss tells no length
        kept = (state.at, state.best, state.beside)
        at, best, beside = tree_where(better, (length, value, beside), kept)
        return State(length, at, best, beside, better)

    # From twice the whole length: a first evaluation of its own would be compiled a second time.
    two, infinite = jnp.full((), 2, jnp.float32), jnp.full_like(before, jnp.inf)
    first = State(two, two, infinite, start, jnp.array(True))
    return jax.lax.while_loop(unfinished, halve, first)[1:4]


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
    at = lambda a: (loss(output - a.astype(output.dtype) * change), None)
    return halving_search(at, before)[:2]
