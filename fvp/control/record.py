"""The numbers that stand between a direction and the control of its step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class Step(NamedTuple):
    """The quadratic model along the step s = length * d; scalars in float32 or wider.

    Everything is known after the solve: no product is spent on it.
    """

    slope: Array  # gradient . d
    curvature: Array  # d . A d, the curvature and the l2 term, without the damping
    damping_term: Array  # damping * d . d
    length: Array  # the multiple of d that is tried
    damping: Any = 0.0
    part: Any = 1.0  # of the learning rate that bounds and searches left of the length

    @property
    def reduction(self) -> Array:
        """By how much the loss falls according to the model without damping."""
        return self.length * self.slope - 0.5 * self.length**2 * self.curvature

    @property
    def scale(self) -> Array:
        """1/2 s^T (A + damping I) s, the yardstick for errors of the model."""
        return 0.5 * self.length**2 * (self.curvature + self.damping_term)


class Outcome(NamedTuple):
    """What trying the step said."""

    error: Array  # predicted minus actual reduction; not finite where the trial was not
    rounding: Array  # below this, `error` says nothing
    worse: Array  # bool, the loss rose or is not finite


def unknown_outcome(step: Step) -> Outcome:
    """The outcome where nothing can be tried: rounding hides the error."""
    return Outcome(
        error=jnp.zeros_like(step.scale),
        rounding=jnp.full_like(step.scale, jnp.inf),
        worse=jnp.zeros((), jnp.bool_),
    )
