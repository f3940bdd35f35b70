"""Levenberg-Marquardt damping that needs no tuning, from full batch down to small batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from fvp.control.record import Outcome, Step

# Errors of the quadratic model, as fractions of 1/2 s^T (A + damping I) s. Classical thresholds on
# the reduction ratio (1/4, 3/4) let small batches be fitted to the last digit and raise the loss
# of the others; these ask the model to be right to a few per cent.
_TRUSTED, _DISTRUSTED = 0.02, 0.05
# The next gradient agrees with a step when, averaged over steps, it keeps this part of its slope.
_AGREEMENT, _MEMORY = 0.25, 0.9


class LevenbergMarquardtState(NamedTuple):
    """State of :class:`LevenbergMarquardt`; float32 scalars."""

    factor: Array  # damping over gradient norm; 0 before the first step
    slope: Array  # gradient . direction of the last step; 0 after a rejection
    slopes: Array  # decaying sum of these
    next_slopes: Array  # decaying sum of the next gradients' slopes along the same directions


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping = factor * norm of the gradient, with a factor that follows the model's errors.

    Proportional to the gradient's norm, the damping falls by itself as training converges, and a
    hard batch, whose gradient is large, is met with more of it. After each step the error of the
    quadratic model, (predicted - actual reduction) / (1/2 s^T (curvature + damping) s), corrects
    the factor: above 5% it grows, times ``increase``; below 2% it shrinks, times ``decrease`` where
    the next batch's gradient still points along the step (full batches, or far from the minimum),
    by 2% where it does not, because then the noise of the batches and not the model limits the
    step. A step that raises the loss or gives a value that is not finite is rejected.

    Free of scale: the first damping is ``initial`` times the curvature along the gradient,
    g^T F g / g^T g, so that the units of loss and parameters do not matter.

    The reduction is measured with ``value_fn(params, batch)`` where ``update`` gets it, otherwise
    with the head's nll at ``targets``. Without either, the exact KL divergence of the step is held
    against its prediction 1/2 s^T F s, which bounds steps but can't see the loss rise. With
    ``operator=`` and no ``batch=`` nothing can be tried: the factor then follows the agreement of
    consecutive gradients alone, and a predicted KL of 0.1 bounds the step.

    Args:
      initial: damping of the first step over the curvature along its gradient.
      increase: what the factor is multiplied by after a bad prediction.
      decrease: what it is multiplied by after a good one, while gradients agree.

    Raises:
      ValueError: for values that can't be: initial <= 0, increase <= 1, decrease outside (0, 1).

    Example:
      >>> import fvp
      >>> rule = fvp.LevenbergMarquardt(initial=1.0)
      >>> tx = fvp.scale_by_fisher(lambda w, x: x @ w, fvp.Gaussian(), damping=rule)

    Reference:
      D. Marquardt, 1963; J. Martens, Deep learning via Hessian-free optimization, 2010, section 4.1;
      damping by the gradient norm: J. Fan and Y. Yuan, On the quadratic convergence of the
      Levenberg-Marquardt method without nonsingularity assumption, 2005.
    """

    initial: Any = 0.15
    increase: Any = 4.0
    decrease: Any = 1 / 3

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("initial", lambda x: x > 0, "a positive number"),
            ("increase", lambda x: x > 1, "more than 1"),
            ("decrease", lambda x: 0 < x < 1, "a number between 0 and 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Tracer) and not valid(value):
                raise ValueError(f"{name}: expected {expected}, got {value}.")

    def init(self) -> LevenbergMarquardtState:
        """The state before the first step; one buffer for each field, so that it can be donated."""
        return LevenbergMarquardtState(*[jnp.zeros((), jnp.float32) for _ in range(4)])

    def observe(
        self, state: LevenbergMarquardtState, next_slope: Array, norm: Array, rayleigh: Callable
    ) -> LevenbergMarquardtState:
        """Takes in a new gradient, its slope along the last direction and its norm.

        ``rayleigh()`` is the curvature along the gradient; it is asked for once, at the first step.
        """

        def first() -> Array:
            curvature = rayleigh()
            start = jnp.where(curvature > 0, self.initial * curvature, norm) / norm
            return jnp.where(jnp.isfinite(start), start, 0).astype(jnp.float32)

        factor = jax.lax.cond(state.factor > 0, lambda: state.factor, first)
        return state._replace(
            factor=factor,
            slopes=_MEMORY * state.slopes + state.slope,
            next_slopes=_MEMORY * state.next_slopes
            + jnp.where(state.slope == 0, 0, next_slope).astype(jnp.float32),
        )

    def damping(self, state: LevenbergMarquardtState, norm: Array) -> Array:
        """The damping of the step that follows :meth:`observe`."""
        return state.factor * norm

    def correct(
        self, state: LevenbergMarquardtState, step: Step, outcome: Outcome, accepted: Array
    ) -> LevenbergMarquardtState:
        """The factor after a step was tried, and the slope that the next gradient is held to."""
        known = outcome.rounding < step.scale
        error = (outcome.error - jnp.sign(outcome.error) * outcome.rounding) / step.scale
        agree = (state.slopes > 0) & (state.next_slopes > _AGREEMENT * state.slopes)
        overshot = ~jnp.isfinite(outcome.rounding) & (state.next_slopes < -0.5 * state.slopes)
        shrink = jnp.where(agree, self.decrease, 0.98)
        good = jnp.where(known, error < _TRUSTED, ~jnp.isfinite(outcome.rounding))
        bad = outcome.worse | jnp.where(known, ~(error <= _DISTRUSTED), overshot)
        change = jnp.where(bad, self.increase, jnp.where(good, shrink, 1))
        return state._replace(
            factor=jnp.clip(state.factor * change, 1e-30, 1e30).astype(jnp.float32),
            slope=jnp.where(accepted, step.slope, 0).astype(jnp.float32),
        )
