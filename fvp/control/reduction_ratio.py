"""The classical Levenberg-Marquardt rule, on the ratio of the actual to the predicted reduction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from fvp.checks import check_nonnegative
from fvp.control.record import Outcome, Step
from fvp.control.rule import DampingRule, Observation
from fvp.typing import Params

# docs/decisions/steps.md
_TRUSTED, _DISTRUSTED = 0.75, 0.25
_FALL, _RISE, _REJECTED = 0.5, 2.0, 4.0  # what damping is multiplied by
_SMALLEST, _LARGEST = 1e-8, 1e30


@dataclasses.dataclass(frozen=True)
class ReductionRatio(DampingRule):
    """Damping that is halved where the loss fell by more than 3/4 of what the model said.

    It is doubled below 1/4, and four times as large after a step that was not accepted. Where
    rounding hides the reduction it stays. The state is the damping of the next step.

    Args:
      initial: the first damping.

    Examples:
      >>> import fvp
      >>> rule = fvp.ReductionRatio(initial=1.0)
      >>> tx = fvp.scale_by_kfac(lambda w, x: x @ w, fvp.Gaussian(), damping=rule)

    Reference:
      D. Marquardt, 1963; J. Martens, R. Grosse, 2015, section 6.5.
    """

    initial: Any = 0.1

    def __post_init__(self) -> None:
        check_nonnegative(self.initial, "initial")

    def init(self, params: Params) -> Array:
        """The first damping."""
        del params
        return jnp.array(self.initial, jnp.float32)

    def propose(self, state: Array, observation: Observation) -> tuple[Array, Array]:
        """What the last step left."""
        del observation
        return state, state

    def correct(self, state: Array, step: Step, outcome: Outcome, accepted: Array) -> Array:
        """The damping of the next step."""
        predicted = step.reduction
        ratio = 1 - outcome.error / predicted
        change = jnp.where(ratio > _TRUSTED, _FALL, jnp.where(ratio < _DISTRUSTED, _RISE, 1.0))
        change = jnp.where(outcome.rounding < predicted, change, 1.0)
        adapted = state * jnp.where(accepted, change, _REJECTED)
        return jnp.clip(adapted, _SMALLEST, _LARGEST).astype(state.dtype)
