"""Steps where the noise of the batches leads.

No batch is solved for there: each would be fitted, noise and all. The direction is the gradient
over the root of its averaged squares, in the eigenbases of its averaged outer products. Steps go to
the average of where such directions lead, and their length is learned from the slope that the next
batch finds along them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.claims import Claims
from fvp.mesh import auto_sharded
from fvp.numerics import computed_once, tree_vdot, tree_zeros_like
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.transforms.watch import NoiseState, after_noise
from fvp.typing import Params

# First decrease of the loss over the claims before it; docs/decisions/steps.md
_CAUTION = 0.1
_HORIZON = 1 - 1 / 30  # memory of the steps along which the next batch's slope is taken


def is_sound(square: Array) -> Array:
    """Whether a gradient of that square can be averaged: squares of all entries stay finite."""
    return square < jnp.finfo(square.dtype).max / 64


def no_step(like: Params, state: NaturalGradientState) -> tuple[Params, NaturalGradientState]:
    """Where noise leads and the gradient isn't sound: nothing changes."""
    return tree_zeros_like(like), after_noise(state, state.noise, accepted=False)


def noise_step(
    options: Options, gradient: Params, square: Array, like: Params, state: NaturalGradientState
) -> tuple[Params, NaturalGradientState]:
    """One step where noise leads, in the dtypes of ``like``, from a sound gradient of that square.

    The gradient is that of the loss with its l2 term.
    """
    noise: NoiseState = state.noise
    moments, direction = auto_sharded(
        lambda m, g: m.whitened(g), noise.moments, gradient, like=(noise.moments, gradient)
    )
    learned = noise.learned.learned(*(tree_vdot(x, noise.trail) for x in (gradient, direction)))
    last = noise.learned.length
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    first = _first_length(noise.claims, jnp.sqrt(square), size)
    learned = learned._replace(length=jnp.where(last == 0, first, learned.length))
    longer = learned.length / jnp.where(last == 0, learned.length, last)
    learned, length = learned.shortened(tree_vdot(direction, direction))
    rate = (options.rate(state.count) * length).astype(jnp.float32)
    anew = learned.only_uphill
    learned = learned._replace(lasting=jnp.where(anew, 0, learned.lasting))
    average, step = noise.average.stepped(direction, rate, longer, anew)
    remembered = computed_once(jnp.where(anew, 0, _HORIZON))

    def update(step: Array, g: Array) -> Array:
        largest = float(jnp.finfo(g.dtype).max)
        return jnp.clip(options.sign * step, -largest, largest).astype(g.dtype)

    trail = lambda step, old: (remembered * old + step).astype(old.dtype)
    return jax.tree.map(update, step, like), after_noise(
        state,
        noise._replace(
            learned=learned,
            average=average,
            moments=moments,
            trail=jax.tree.map(trail, step, noise.trail),
        ),
    )


def _first_length(claims: Claims, norm: Array, size: int) -> Array:
    """Where the loss falls by a little of what was claimed while batches were solved for, at most.

    The first direction has ``size`` entries of one, so that its slope along a gradient of this
    ``norm`` is at most norm sqrt(size).
    """
    scale = jnp.where(claims.claimed > 0, claims.claimed, claims.refuted)
    slope = norm * math.sqrt(size)
    return (_CAUTION * scale / jnp.where(slope > 0, slope, 1)).astype(jnp.float32)
