"""Steps where the noise of the batches leads: what of them is kept, and how one is made.

No batch is solved for there: each would be fitted, noise and all. The direction is the averaged
gradient over the root of its averaged squares, in the eigenbases of its averaged outer products.
Its length is learned from the slope that the next batch finds along it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control.claims import Claims
from fvp.control.learned_length import LearnedLength
from fvp.control.record import Outcome, Step
from fvp.mesh import auto_sharded
from fvp.numerics import tree_is_finite, tree_vdot, tree_where, tree_zeros_like
from fvp.preconditioners.moments import Moments
from fvp.transforms.objective import Objective
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.typing import Params

# First decrease of the loss over the claims before it; docs/decisions/steps.md
_CAUTION = 0.01


class NoiseState(NamedTuple):
    """What the noise of the batches is known by, and what its steps need."""

    leads: Array  # bool scalar; once it does it stays so
    claims: Claims
    taken: Array  # float32 scalar, length of the last step along the direction, while it does not
    aligned: Array  # float32 scalar, parameters . last step, before it
    learned: LearnedLength
    moments: Moments

    @classmethod
    def of(cls, params: Params) -> NoiseState:
        """Before the first step."""
        return cls(
            leads=jnp.zeros((), jnp.bool_),
            claims=Claims.none(),
            taken=jnp.zeros((), jnp.float32),
            aligned=jnp.zeros((), jnp.float32),
            learned=LearnedLength.unknown(),
            moments=Moments.of(params),
        )


def with_claim(
    state: NaturalGradientState, objective: Objective, record: Step, outcome: Outcome, step: Params
) -> NoiseState:
    """With this batch's view of the last step, and the claim of a new one.

    ``state`` is that before the ``step``, which is to be subtracted, and zeros if it was rejected.
    """
    noise: NoiseState = state.noise
    if not objective.data.has_loss:
        return noise
    before, params = objective.loss_before(), objective.params
    precision = float(jnp.finfo(objective.output_dtype).eps)
    claims = noise.claims.held_against(before, _part_taken(state, params), precision)
    moved = tree_vdot(step, step) > 0
    if_moved = lambda x: jnp.where(moved, x, 0)
    slope, reduction = record.length * record.slope, record.reduction - outcome.error
    return noise._replace(
        claims=claims.after(before, if_moved(slope), if_moved(reduction)),
        taken=if_moved(record.length).astype(jnp.float32),
        aligned=tree_vdot(params, step).astype(jnp.float32),
    )


def _part_taken(state: NaturalGradientState, params: Params) -> Array:
    """How much of the last step is in ``params``: less than 1 where others have shortened it.

    1 where rounding hides it.
    """
    noise: NoiseState = state.noise
    square = noise.taken**2 * tree_vdot(state.direction, state.direction)
    safe = jnp.where(square > 0, square, 1)
    part = (noise.aligned - noise.taken * tree_vdot(params, state.direction)) / safe
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)), default=0)
    unsure = 0.01 + 16 * eps * jnp.sqrt(tree_vdot(params, params) / safe)
    whole = (square == 0) | ~(jnp.abs(part - 1) > unsure)
    return jnp.where(whole, 1, jnp.clip(part, 0, 2)).astype(jnp.float32)


def led_by_noise(
    options: Options,
    last: NaturalGradientState,
    update: Params,
    state: NaturalGradientState,
) -> tuple[Params, NaturalGradientState]:
    """The step that was found; or, from where noise leads, the ``last`` one taken back."""
    noise: NoiseState = state.noise
    leads = noise.claims.noise_leads
    length = -options.sign * last.noise.taken
    back = jax.tree.map(lambda u, d: (length * d).astype(u.dtype), update, last.direction)
    turned = last._replace(
        count=state.count,
        direction=tree_zeros_like(last.direction),
        accepted=jnp.zeros((), jnp.bool_),
        predicted_kl=jnp.zeros((), jnp.float32),
        noise=noise._replace(leads=leads),
    )
    return tree_where(leads, (back, turned), (update, state))


def noise_step(
    options: Options, gradient: Params, state: NaturalGradientState, objective: Objective
) -> tuple[Params, NaturalGradientState]:
    """One step where noise leads."""
    noise: NoiseState = state.noise
    gradient = objective.gradient_with_penalty(gradient)
    scalar = jnp.zeros(())
    moments, *slopes = auto_sharded(
        lambda m, g: m.updated(g), noise.moments, gradient, like=(noise.moments, scalar, scalar)
    )
    make = lambda m, like: m.direction(like)
    direction = auto_sharded(make, moments, state.direction, like=state.direction)
    learned = noise.learned.learned(*slopes)
    first = _first_length(noise.claims, tree_vdot(gradient, direction))
    length = jnp.where(learned.length == 0, first, learned.length)
    rate = (options.rate(state.count) * length).astype(jnp.float32)
    step = jax.tree.map(lambda d: (rate * d).astype(d.dtype), direction)
    update = jax.tree.map(lambda d, g: (options.sign * d).astype(g.dtype), step, gradient)
    sound = tree_is_finite(moments) & tree_is_finite(update)
    kept = state._replace(
        direction=step,
        iterations=jnp.zeros((), jnp.int32),
        residual_norm=jnp.zeros((), jnp.float32),
        predicted_kl=jnp.zeros((), jnp.float32),
        noise=noise._replace(learned=learned._replace(length=length), moments=moments),
    )
    update, state = tree_where(sound, (update, kept), (tree_zeros_like(update), state))
    return update, state._replace(count=optax.safe_increment(state.count), accepted=sound)


def _first_length(claims: Claims, slope: Array) -> Array:
    """Where the loss would fall by a little of what was claimed while batches were solved for."""
    scale = jnp.where(claims.claimed > 0, claims.claimed, claims.refuted)
    return (_CAUTION * scale / jnp.where(slope > 0, slope, 1)).astype(jnp.float32)
