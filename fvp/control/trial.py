"""Trying a step: on the loss, or on the divergence that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from fvp.control.record import Outcome, Step
from fvp.curvature.pieces import (
    apply_weights,
    example_weights,
    mask_outputs,
    total_weight,
    weighted_nll,
)
from fvp.heads import Head
from fvp.mesh import AxisName, sum_over
from fvp.numerics import widen

_LEAST = 1e-4  # of the predicted reduction (J. Nocedal, S. Wright, Numerical optimization, 4.1)


def mean_nll(head: Head, z: Array, targets: Any, weights: Any, axis_name: AxisName) -> Array:
    """The loss sum_i w_i nll_i / sum_i w_i of the outputs ``z``."""
    weights = example_weights(head, z, weights)
    total = total_weight(weights, z, head.batch_shape(z), axis_name)
    return sum_over(weighted_nll(head, z, targets, weights), axis_name) / total


def mean_kl(head: Head, z: Array, z_new: Array, weights: Any, axis_name: AxisName) -> Array:
    """sum_i w_i KL(r(z_i) to r(z_new_i)) / sum_i w_i."""
    weights = example_weights(head, z, weights)
    total = total_weight(weights, z, head.batch_shape(z), axis_name)
    mask = lambda z: widen(mask_outputs(weights, head.event_ndim, z))
    divergence = jnp.sum(apply_weights(weights, 0, head.kl(mask(z), mask(z_new))))
    return sum_over(divergence, axis_name) / total


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
