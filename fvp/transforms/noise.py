"""Steps where the noise of the batches leads.

No batch is solved for there: each would be fitted, noise and all. The direction is the gradient
over the root of its averaged squares, in the eigenbases of its averaged outer products. Steps go to
the average of where such directions lead, and their length is learned from the slope that the next
batch finds along them. Where such a step is more work than the gradient of a small batch, the mean
of several gradients is taken for one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.claims import Claims
from fvp.mesh import auto_sharded
from fvp.numerics import cast_like, computed_once, tree_vdot, tree_zeros_like, widen
from fvp.preconditioners.moments import turning_multiplications
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.transforms.watch import NoiseState, after_noise
from fvp.typing import Params

# First decrease of the loss over the claims before it; docs/decisions/steps.md
_CAUTION = 0.1
# Gradients for one step: as many as make its products with bases a quarter of their work, or four
_PART, _MOST = 4, 4
_STEPS = 50  # of one each, then of two, and so on
# First steps with bases that are refreshed often: where gradients never wait, and where they may
_ALONE, _TOGETHER = 200, 30
_HORIZON = 1 - 1 / 30  # memory of the steps along which the next batch's slope is taken


def is_sound(square: Array) -> Array:
    """Whether a gradient of that square can be averaged: squares of all entries stay finite."""
    return square < jnp.finfo(square.dtype).max / 64


def no_step(like: Params, state: NaturalGradientState) -> tuple[Params, NaturalGradientState]:
    """Where noise leads and the gradient isn't sound: nothing changes."""
    return tree_zeros_like(like), after_noise(state, state.noise, accepted=False)


def gradients_for_one_step(gradient: Params, forward: int) -> int:
    """How many are averaged for a step, by shapes alone.

    As many as make turning their mean into the bases and back a quarter of their own work, which is
    three times the multiplications of a ``forward`` pass for each; but few.
    """
    wanted = math.ceil(_PART * turning_multiplications(gradient) / max(1, 3 * forward))
    return max(1, min(_MOST, wanted))


def makes_a_step(number: int, noise: NoiseState) -> Array:
    """Whether the next gradient does not have to wait."""
    return noise.waiting + 1 >= _averaged(number, noise.moments.gradients)


def _averaged(number: int, steps: Array) -> Array:
    """Gradients for the step after so many, where ``number`` are in the end.

    The first steps, from which bases and length are learned, are made of one each, and those after
    them of more and more.
    """
    return jnp.minimum(number, 1 + steps // _STEPS)


def mean_gradient(gradient: Params, state: NaturalGradientState) -> Params:
    """That of the gradients that wait and this one, in float32 or wider."""
    waiting = state.noise.waiting.astype(jnp.float32)
    old, new = computed_once((waiting / (waiting + 1), 1 / (waiting + 1)))
    mean = lambda m, g: old * widen(m) + new * widen(g)
    return jax.tree.map(mean, state.direction, gradient)


def wait(
    gradient: Params, like: Params, state: NaturalGradientState
) -> tuple[Params, NaturalGradientState]:
    """No step until there are more gradients."""
    mean = cast_like(mean_gradient(gradient, state), state.direction)
    noise = state.noise._replace(waiting=state.noise.waiting + 1)
    return tree_zeros_like(like), after_noise(state._replace(direction=mean), noise)


def noise_step(
    options: Options,
    gradient: Params,
    square: Array,
    like: Params,
    state: NaturalGradientState,
    number: int,
) -> tuple[Params, NaturalGradientState]:
    """One step where noise leads, in the dtypes of ``like``, from a sound gradient of that square.

    The gradient is that of the loss with its l2 term; up to ``number`` are averaged for a step.
    """
    noise: NoiseState = state.noise
    early = _ALONE if number == 1 else _TOGETHER
    moments, direction = auto_sharded(
        lambda m, g: m.whitened(g, early), noise.moments, gradient, like=(noise.moments, gradient)
    )
    slope, whitened = (tree_vdot(x, noise.trail) for x in (gradient, direction))
    gradients = noise.waiting + 1
    learned = noise.learned.learned(slope, whitened, gradients)
    last = noise.learned.length
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    first = _first_length(noise.claims, jnp.sqrt(square), size)
    learned = learned._replace(length=jnp.where(last == 0, first, learned.length))
    steps = noise.moments.gradients
    more = _averaged(number, steps) / _averaged(number, jnp.maximum(steps - 1, 0))
    # Means of twice as many make half as many steps, with 1 / sqrt(2) of the noise: longer by
    # sqrt(2) they lead as far, and as far astray.
    learned = learned._replace(length=learned.length * jnp.sqrt(more))
    longer = learned.length / jnp.where(last == 0, learned.length, last)
    learned, length = learned.shortened(tree_vdot(direction, direction), gradients)
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
            waiting=jnp.zeros((), jnp.int32),
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
