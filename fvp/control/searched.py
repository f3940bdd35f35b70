"""Damping that follows how much of an exact step a line search leaves."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.record import Outcome, Step
from fvp.control.rule import DampingRule, Observation
from fvp.typing import Params

# Where these numbers come from: docs/decisions/steps.md
_CHANGE = 30.0  # of the damping, up or down
_SHORT, _LONG = 1 / 8, 1 / 4  # parts of a step below which damping grows, from which it falls
_LEADS = 1e3  # damping over the curvature along a step above which it grows no more
_FIRST = 1e-3  # first damping over the curvature along the gradient
_LEAST = 2.0**-30  # the same over the norm of the gradient, where F all but vanishes
_UNKNOWN = -1.0  # the damping that the next step has to choose first


@dataclasses.dataclass(frozen=True)
class SearchedDamping(DampingRule):
    """None where none is needed, for direct solvers whose steps the loss shortens.

    An undamped step is exact where the model is linear, and the fastest near the minimum. Far from
    it the smallest eigenvalues make it so long that the search leaves next to nothing of it, and
    training stands still: where less than 1/8 is left, damping starts at 1e-3 of the curvature
    along the gradient, and grows 30 times after each such step, as long as it does not make a
    gradient step of it, which the search can shorten as well. It falls 30 times where 1/4 or more
    is left, down to what the solver's rounding needs.

    The state is the damping, float32: 0 while none was needed.
    """

    adapts: ClassVar[bool] = False
    needs_direct: ClassVar[bool] = True

    def init(self, params: Params) -> Array:
        """No damping."""
        del params
        return jnp.zeros((), jnp.float32)

    def propose(self, state: Array, observation: Observation) -> tuple[Array, Array]:
        """What the last step left; the first damping costs a JVP."""

        def first() -> Array:
            curvature = observation.rayleigh().astype(jnp.float32)
            least = _LEAST * observation.norm.astype(jnp.float32)
            return jnp.maximum(jnp.where(curvature > 0, _FIRST * curvature, 0), least)

        damping = jax.lax.cond(state < 0, first, lambda: state)
        return damping, damping

    def correct(self, state: Array, step: Step, outcome: Outcome, accepted: Array) -> Array:
        """From the part of the step that the search left."""
        damping = jnp.asarray(step.damping, state.dtype)
        # Of a solve that was lost, whose error is infinite, the curvature is rounding.
        known = jnp.isfinite(outcome.error)
        leads = known & (step.damping_term > _LEADS * step.curvature)
        grown = jnp.where(state > 0, jnp.where(leads, 1, _CHANGE) * damping, _UNKNOWN)
        fallen = jnp.where(state > 0, damping / _CHANGE, 0)
        long = accepted & (step.part >= _LONG)
        short = ~accepted | (step.part < _SHORT)
        changed = jnp.where(short, grown, jnp.where(long, fallen, state))
        return jnp.where(jnp.isfinite(changed), changed, state)
