"""Steps where the noise of the batches leads: what of them is kept, and how one is made.

No batch is solved for there: each would be fitted, noise and all. The direction is the averaged
gradient over the root of its averaged squares, in the eigenbases of its averaged outer products.
Its length is learned from the slope that the next batch finds along it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control.claims import MEMORY, Claims
from fvp.control.learned_length import LearnedLength
from fvp.control.record import Outcome, Step
from fvp.mesh import auto_sharded
from fvp.numerics import computed_once, tree_vdot, tree_zeros_like
from fvp.preconditioners.moments import Moments
from fvp.transforms.objective import Objective
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.typing import Params

# First decrease of the loss over the claims before it; docs/decisions/steps.md
_CAUTION = 0.01
_REMEMBERED = 10  # steps before which none is forgotten


class NoiseState(NamedTuple):
    """What the noise of the batches is known by, and what its steps need; float32 scalars."""

    leads: Array  # bool; once it does it stays so
    claims: Claims
    trail: Params  # sum of the steps before it does; after the first ten it decays as claims do
    taken: Array  # length of the last of them along its direction
    aligned: Array  # parameters . last of them, before it
    square: Array  # last . last
    learned: LearnedLength
    moments: Moments

    @classmethod
    def of(cls, params: Params) -> NoiseState:
        """Before the first step."""
        zero = lambda: jnp.zeros((), jnp.float32)
        return cls(
            leads=jnp.zeros((), jnp.bool_),
            claims=Claims.none(),
            trail=optax.tree.zeros_like(params),
            taken=zero(),
            aligned=zero(),
            square=zero(),
            learned=LearnedLength.unknown(),
            moments=Moments.of(params),
        )


def seen_by(objective: Objective, state: NaturalGradientState) -> tuple[NoiseState, Objective]:
    """With this batch's view of the last step; and the objective that knows its loss.

    Where noise leads already there is nothing to find out, and no loss is asked for.
    """
    noise: NoiseState = state.noise
    if not objective.data.has_loss:
        return noise, objective
    precision = float(jnp.finfo(objective.output_dtype).eps)
    dtype = jax.eval_shape(objective.loss_before).dtype

    def look() -> tuple[Array, Claims, Array]:
        before, part = objective.loss_before(), _part_taken(state, objective.params)
        claims = noise.claims.held_against(before, part, precision)
        return claims.noise_leads, claims, before

    known = lambda: (noise.leads, noise.claims, jnp.full((), jnp.nan, dtype))
    leads, claims, before = jax.lax.cond(noise.leads, known, look)
    return noise._replace(leads=leads, claims=claims), objective.knowing(before)


def with_claim(
    state: NaturalGradientState, objective: Objective, record: Step, outcome: Outcome, step: Params
) -> NoiseState:
    """With the claim of a ``step``, which is to be subtracted, and zeros if it was rejected."""
    noise: NoiseState = state.noise
    if not objective.data.has_loss:
        return noise
    memory = jnp.where(state.count < _REMEMBERED, 1, MEMORY)
    square = tree_vdot(step, step).astype(jnp.float32)
    if_moved = lambda x: jnp.where(square > 0, x, 0)
    slope, reduction = record.length * record.slope, record.reduction - outcome.error
    return noise._replace(
        claims=noise.claims.after(objective.loss_before(), if_moved(slope), if_moved(reduction)),
        trail=jax.tree.map(
            lambda old, new: (memory * old + new).astype(old.dtype), noise.trail, step
        ),
        taken=if_moved(record.length).astype(jnp.float32),
        aligned=tree_vdot(objective.params, step).astype(jnp.float32),
        square=square,
    )


def _part_taken(state: NaturalGradientState, params: Params) -> Array:
    """How much of the last step is in ``params``: less than 1 where others have shortened it.

    1 where rounding hides it.
    """
    noise: NoiseState = state.noise
    safe = jnp.where(noise.square > 0, noise.square, 1)
    part = (noise.aligned - noise.taken * tree_vdot(params, state.direction)) / safe
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)), default=0)
    unsure = 0.01 + 16 * eps * jnp.abs(noise.aligned) / safe
    whole = (noise.square == 0) | ~(jnp.abs(part - 1) > unsure)
    return jnp.where(whole, 1, jnp.clip(part, 0, 2)).astype(jnp.float32)


def noise_step(
    options: Options, gradient: Params, state: NaturalGradientState, objective: Objective
) -> tuple[Params, NaturalGradientState]:
    """One step where noise leads; the first also takes back what was fitted to the batches.

    That is the last step that was solved for, or where the loss has risen all that are remembered.

    A gradient whose square is beyond the range of floats, or not finite, changes nothing.
    """
    slope_of = objective.gradient_with_penalty(gradient)
    square = tree_vdot(slope_of, slope_of)
    sound = square < jnp.finfo(square.dtype).max / 64  # so that averages of squares are finite
    made = lambda: _made(options, slope_of, jnp.sqrt(square), gradient, state)
    skipped = lambda: (tree_zeros_like(gradient), state._replace(accepted=jnp.array(False)))
    update, state = jax.lax.cond(sound, made, skipped)
    return update, state._replace(count=optax.safe_increment(state.count))


def _made(
    options: Options, gradient: Params, norm: Array, like: Params, state: NaturalGradientState
) -> tuple[Params, NaturalGradientState]:
    """The step, in the dtypes of ``like``, from a sound gradient of that norm."""
    noise: NoiseState = state.noise
    scalar = jnp.zeros(())
    moments, *slopes = auto_sharded(
        lambda m, g: m.updated(g), noise.moments, gradient, like=(noise.moments, scalar, scalar)
    )
    make = lambda m, like: m.direction(like)
    direction = auto_sharded(make, moments, gradient, like=gradient)
    learned = noise.learned.learned(*slopes)
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    first = _first_length(noise.claims, norm, size)
    learned = learned._replace(length=jnp.where(learned.length == 0, first, learned.length))
    rate = (options.rate(state.count) * learned.length).astype(jnp.float32)
    rate, taken, risen = computed_once((rate, noise.taken, noise.claims.loss_has_risen))

    def update(d: Array, last: Array, trail: Array, g: Array) -> Array:
        largest = float(jnp.finfo(g.dtype).max)
        d, last, trail = (x.astype(jnp.float32) for x in (d, last, trail))
        step = rate * d - jnp.where(risen, trail, taken * last)
        return jnp.clip(options.sign * step, -largest, largest).astype(g.dtype)

    step = jax.tree.map(update, direction, state.direction, noise.trail, like)
    return step, state._replace(
        iterations=jnp.zeros((), jnp.int32),
        residual_norm=jnp.zeros((), jnp.float32),
        predicted_kl=jnp.zeros((), jnp.float32),
        accepted=jnp.array(True),
        noise=noise._replace(
            learned=learned,
            moments=moments,
            trail=tree_zeros_like(noise.trail),
            taken=jnp.zeros((), jnp.float32),
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
