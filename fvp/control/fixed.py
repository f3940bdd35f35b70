"""Damping that the user gives."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fvp.checks import check_nonnegative
from fvp.control.record import Outcome, Step
from fvp.control.rule import DampingRule, Observation
from fvp.typing import Params


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
