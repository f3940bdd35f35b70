"""Trying a step: on the loss, or on the divergence that it makes."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from fvp.control.record import Outcome, Step

_LEAST = 1e-4  # of the predicted reduction; docs/decisions/steps.md


def loss_outcome(step: Step, before: Array, loss: Callable[[Array], Array]) -> Outcome:
    """Holds the reduction of the loss against the model's; ``loss(length)`` is at the new point.

    Worse is a loss that rose, and one that did not move where the model sees it fall: the step then
    went where the loss is flat, or belongs to another loss, and its length means nothing.
    """
    after = loss(step.length)
    reduction = before - after
    rounding = 4 * jnp.finfo(after.dtype).eps * (jnp.abs(before) + jnp.abs(after))
    flat = (step.reduction > rounding) & (reduction < _LEAST * step.reduction)
    worse = ~(reduction >= -rounding) | flat | ~jnp.isfinite(after)
    return Outcome(step.reduction - reduction, rounding, worse)


def divergence_outcome(step: Step, predicted: Array, exact: Array) -> Outcome:
    """Holds the exact KL of the step against 1/2 s^T F s; worse where far above."""
    error = exact - predicted
    rounding = 4 * jnp.finfo(exact.dtype).eps * (jnp.abs(exact) + predicted)
    return Outcome(error, rounding, ~(error <= step.scale))
