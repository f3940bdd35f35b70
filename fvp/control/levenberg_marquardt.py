"""Levenberg-Marquardt damping that needs no tuning, from full batch down to small batches."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from fvp.control.record import Outcome, Step
from fvp.control.rule import DampingRule, Observation
from fvp.numerics import computed_once, sum_entries, tree_vdot
from fvp.scalars import Scalars

# Where these numbers come from: docs/decisions/steps.md
# Errors of the quadratic model over 1/2 s^T (A + damping) s. The classical thresholds on the
# reduction ratio (1/4, 3/4) let small batches be fitted to the last digit and raise the loss
# on all others; these ask the model to be right to some per cent.
_TRUSTED, _DISTRUSTED = 0.05, 0.1
# The next gradient agrees with a step when, averaged over steps, it keeps this part of its slope.
_AGREEMENT, _MEMORY = 0.25, 0.9
# Noise leads when it finds less than the model expects, on average by this part of the slope:
# measured at 0.4 and below on full batches, mostly 0.5 to 0.9 on small ones.
_SURPRISE = 0.5
# Decrease where the noise of the batches limits the step: slow, but faster while the model expects
# the step to leave more than this part of the slope on its own batch, because of the damping.
_SLOW, _FASTER, _REMAINING = 0.99, 0.9, 0.6
_MOMENTUM = 0.9  # the largest
_LEAST = 2.0**-30  # first lambda over the norm of the gradient, where F all but vanishes
_FLOOR = 1e-3  # of the diagonal (s / mean s + floor)^(5/8)


class Progress(Scalars):
    """What the steps of `LevenbergMarquardt` came to."""

    factor: Array  # damping over the root of the gradient norm; 0 before the first step
    slope: Array  # gradient . direction of the last step; 0 after a rejection
    agreement: Array  # decaying sum of next gradient . direction over that slope
    expected: Array  # the part of that slope that the model expects the next step to find
    surprise: Array  # running average from 0 of what was expected beyond what was found
    seen: Array  # decaying count of these


class LevenbergMarquardtState(NamedTuple):
    """State of `LevenbergMarquardt`; float32."""

    progress: Progress
    squares: Any  # like the parameters, decaying sum of the squared gradients


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(DampingRule):
    """Damping lambda D with lambda = factor * sqrt(|g|), where the factor follows model errors.

    Proportional to the root of the gradient's norm, the damping falls by itself as training
    converges, and a hard batch, whose gradient is large, is met with more of it. After each step
    the error of the quadratic model, (predicted - actual reduction) / (1/2 s^T (curvature +
    lambda D) s), corrects the factor: above 10% it grows, times ``increase``; below 5% it shrinks,
    times ``decrease`` where the next batch's gradient still points along the step (full batches, or
    far from the minimum). Where it does not, the noise of the batches and not the model limits the
    step, and the factor shrinks by 1%, or by 10% while the damping leaves more than 60% of the
    slope on the batch itself. A step that raises the loss or gives a value that is not finite is
    rejected, and the factor grows, times ``increase`` squared. D = (s / mean s + 1e-3)^(5/8),
    divided by its mean, with s a running average of the squared gradients, remembers which
    parameters earlier batches found steep.

    Free of scale: the first lambda is ``initial`` times the curvature along the gradient,
    g^T F g / g^T g, so that the units of the loss and of the parameters do not matter.

    The reduction is measured with ``value_fn(params, batch)`` where ``update`` gets it, otherwise
    with the head's nll at ``targets``. Without either, the step's KL divergence is bounded by 0.1,
    and held against its prediction 1/2 s^T F s, which can't see the loss rise. With ``operator=``
    and no ``batch=`` nothing can be tried: the factor then stays four times the first one, and it
    is the predicted KL that is bounded.

    Args:
      initial: first lambda over the curvature along the gradient.
      increase: what the factor is multiplied by after a bad prediction.
      decrease: what it is multiplied by after a good one, while gradients agree.

    Raises:
      ValueError: for values that can't be: initial <= 0, increase <= 1, decrease outside (0, 1).

    Examples:
      >>> import fvp
      >>> rule = fvp.LevenbergMarquardt(initial=1.0)
      >>> tx = fvp.scale_by_fisher(lambda w, x: x @ w, fvp.Gaussian(), damping=rule)

    Reference:
      D. Marquardt, 1963; J. Martens, Deep learning via Hessian-free optimization, 2010, sections
      4.1 and 4.7; damping by the root of the gradient norm: K. Mishchenko, Regularized Newton
      method with global O(1/k^2) convergence, 2023.
    """

    initial: Any = 0.12
    increase: Any = 2.0
    decrease: Any = 0.25

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("initial", lambda x: x > 0, "a positive number"),
            ("increase", lambda x: x > 1, "more than 1"),
            ("decrease", lambda x: 0 < x < 1, "a number between 0 and 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Tracer) and not valid(value):
                raise ValueError(f"{name}: expected {expected}, got {value}.")

    def init(self, params: Any) -> LevenbergMarquardtState:
        """The state before the first step."""
        zeros = lambda p: jnp.zeros_like(p, jnp.float32)
        return LevenbergMarquardtState(Progress.zeros(), jax.tree.map(zeros, params))

    def propose(
        self, state: LevenbergMarquardtState, observation: Observation
    ) -> tuple[LevenbergMarquardtState, Array]:
        """Takes in a new gradient, and its slope along the last direction; returns lambda.

        The curvature along the gradient is asked for once, at the first step.
        """
        gradient, last = observation.gradient, observation.last
        root = jnp.sqrt(observation.norm).astype(jnp.float32)

        def first() -> Array:
            curvature = observation.rayleigh().astype(jnp.float32)
            start = jnp.maximum(self.initial * curvature, _LEAST * root * root)
            start = jnp.where(curvature > 0, start, root * root) / root
            return jnp.where(jnp.isfinite(start), start, 0).astype(jnp.float32)

        before = state.progress
        held = before.slope != 0
        kept = tree_vdot(gradient, last).astype(jnp.float32) / jnp.where(held, before.slope, 1)
        kept = jnp.where(held, jnp.clip(jnp.nan_to_num(kept), -1, 1), 0)
        missed = jnp.where(held, before.expected - kept, 0)
        progress = before._replace(
            factor=jax.lax.cond(before.factor > 0, lambda: before.factor, first),
            agreement=_MEMORY * before.agreement + kept,
            surprise=_MEMORY * before.surprise + (1 - _MEMORY) * missed,
            seen=_MEMORY * before.seen + held,
        )
        squares = _averaged_squares(state.squares, gradient)
        return LevenbergMarquardtState(progress, squares), progress.factor * root

    def agrees(self, state: LevenbergMarquardtState) -> Array:
        """Whether gradients still point along the steps before them."""
        return state.progress.agreement > _AGREEMENT * state.progress.seen

    def noisy(self, state: LevenbergMarquardtState) -> Array:
        """Whether they fall short of what the model expects: the noise of the batches leads."""
        return state.progress.surprise > _SURPRISE

    def momentum(self, state: LevenbergMarquardtState, count: Array) -> Array:
        """Of step ``count``: 0.9 where gradients agree; else from 3/4 at first to 0.9 at step 36.

        The memory 1 / (1 - momentum) is then four steps, and one more every six. Under noise the
        first directions are soon out of date; near the minimum those of many batches are needed.
        """
        growing = jnp.minimum(1 - 1 / (4 + count / 6), _MOMENTUM)
        return jnp.where(self.agrees(state), _MOMENTUM, growing)

    def diagonal(self, state: LevenbergMarquardtState) -> Any:
        """The diagonal D, of mean 1; like the parameters, float32."""
        relative = _over_mean(state.squares)
        powers = jax.tree.map(lambda s: _five_eighths(s + _FLOOR), computed_once(relative))
        return computed_once(_over_mean(computed_once(powers)))

    def correct(
        self, state: LevenbergMarquardtState, step: Step, outcome: Outcome, accepted: Array
    ) -> LevenbergMarquardtState:
        """The factor after a step was tried, and the slope that the next gradient is held to."""
        before = state.progress
        known = outcome.rounding < step.scale
        error = (outcome.error - jnp.sign(outcome.error) * outcome.rounding) / step.scale
        good = known & (error < _TRUSTED)
        wrong = ~(error <= _DISTRUSTED)
        bad = known & wrong
        # A slope that left the range of floats, on either side, says nothing about the next one.
        slope = step.slope.astype(jnp.float32)
        known_slope = jnp.isfinite(slope) & (slope != 0) & jnp.isfinite(step.curvature)
        expected = jnp.clip(1 - step.length * step.curvature / step.slope, -1, 1)
        slow = jnp.where(expected > _REMAINING, _FASTER, _SLOW)
        shrink = jnp.where(self.agrees(state), self.decrease, slow)
        change = jnp.where(bad, self.increase, jnp.where(good, shrink, 1))
        # Momentum may climb on a batch just as the model said: no fault of the damping. It starts
        # anew then, and without it (the last slope is zero) there is no such excuse.
        blamed = outcome.worse & (wrong | (before.slope == 0))
        change = jnp.where(blamed, self.increase**2, change)
        progress = before._replace(
            factor=jnp.clip(before.factor * change, 1e-30, 1e30),
            slope=jnp.where(accepted & known_slope, slope, 0),
            expected=jnp.where(accepted & known_slope, expected, 0),
        )
        return state._replace(progress=progress)


def _averaged_squares(squares: Any, gradient: Any) -> Any:
    """The running average with one more gradient, within a range where the sum of all is finite."""
    size = max(1, sum(leaf.size for leaf in jax.tree.leaves(squares)))
    largest = (float(jnp.finfo(jnp.float32).max) / (4 * size)) ** 0.5

    def average(s: Array, g: Array) -> Array:
        g = jnp.clip(g.astype(s.dtype), -largest, largest)
        return _MEMORY * s + (1 - _MEMORY) * jnp.square(g)

    return jax.tree.map(average, squares, gradient)


def _five_eighths(x: Array) -> Array:
    """x^(5/8) by square roots: far cheaper than a power.

    Between the 1/2 of Adam, which small batches want, and the 3/4 of Martens (2010), which
    convolutions want.
    """
    root = jnp.sqrt(x)
    return root * jnp.sqrt(jnp.sqrt(root))


def _over_mean(tree: Any) -> Any:
    """Every entry over the mean of all of them; ones where that is zero."""
    leaves = jax.tree.leaves(tree)
    total = sum((sum_entries(leaf) for leaf in leaves), jnp.zeros((), jnp.float32))
    mean = total / max(1, sum(leaf.size for leaf in leaves))
    usable, mean = computed_once(((mean > 0) & jnp.isfinite(mean), mean))
    return jax.tree.map(lambda s: jnp.where(usable, s / jnp.where(usable, mean, 1), 1), tree)
