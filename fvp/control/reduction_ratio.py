"""The classical Levenberg-Marquardt rule, on the ratio of the actual to the predicted reduction."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from fvp.control.record import Outcome, Step

_TRUSTED, _DISTRUSTED = 0.75, 0.25
_FALL, _RISE, _REJECTED = 0.5, 2.0, 4.0  # what damping is multiplied by
_SMALLEST, _LARGEST = 1e-8, 1e30


def adapted_damping(damping: Array, step: Step, outcome: Outcome, accepted: Array) -> Array:
    """The damping of the next step.

    It is halved where the loss fell by more than 3/4 of what the model said, doubled below 1/4, and
    four times as large after a step that was not accepted. Where rounding hides the reduction it
    stays.
    """
    predicted = step.reduction
    ratio = 1 - outcome.error / predicted
    change = jnp.where(ratio > _TRUSTED, _FALL, jnp.where(ratio < _DISTRUSTED, _RISE, 1.0))
    change = jnp.where(outcome.rounding < predicted, change, 1.0)
    return jnp.clip(damping * jnp.where(accepted, change, _REJECTED), _SMALLEST, _LARGEST)
