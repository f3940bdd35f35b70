"""Damping that the user gives, and none."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fvp.checks import check_nonnegative
from fvp.control.record import Outcome, Step
from fvp.control.rule import DampingRule, Observation
from fvp.typing import Params

# Damping over that of the step that failed, where none was given; docs/decisions/steps.md
_RETRIED = 4.0


@dataclasses.dataclass(frozen=True)
class FixedDamping(DampingRule):
    """A number, or a schedule of the step count. Nothing is tried and nothing is adapted."""

    adapts: ClassVar[bool] = False

    value: Any

    def __post_init__(self) -> None:
        check_nonnegative(self.value, "damping")

    def init(self, params: Params) -> None:
        """Nothing is kept."""
        del params

    def propose(self, state: None, observation: Observation) -> tuple[None, Array]:
        """The damping at the step ``observation.count``."""
        value = self.value(observation.count) if callable(self.value) else self.value
        return state, jnp.asarray(value)

    def correct(self, state: None, step: Step, outcome: Outcome, accepted: Array) -> None:
        """Nothing is learned."""
        del step, outcome, accepted
        return state


@dataclasses.dataclass(frozen=True)
class NoDamping(DampingRule):
    """None, for direct solvers whose steps a line search controls.

    Where not even a search helped, the solve was all rounding: four times the damping that the
    solver itself needed is tried then. The state is that damping, else 0.
    """

    adapts: ClassVar[bool] = False
    needs_direct: ClassVar[bool] = True

    def init(self, params: Params) -> Array:
        """No damping."""
        del params
        return jnp.zeros((), jnp.float32)

    def propose(self, state: Array, observation: Observation) -> tuple[Array, Array]:
        """What the last step left."""
        del observation
        return state, state

    def correct(self, state: Array, step: Step, outcome: Outcome, accepted: Array) -> Array:
        """Zero after a step that was taken."""
        del outcome
        retried = _RETRIED * jnp.asarray(step.damping, state.dtype)
        return jnp.where(accepted, 0, jnp.where(jnp.isfinite(retried), retried, state))
