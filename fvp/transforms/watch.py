"""Whether the noise of the batches leads: what steps claim, and what becomes of it.

Also what is known of that noise from step to step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control.claims import MEMORY, Claims
from fvp.control.iterate_average import IterateAverage
from fvp.control.learned_length import LearnedLength
from fvp.control.record import Outcome, Step
from fvp.numerics import computed_once, in_order, tree_vdot
from fvp.preconditioners.moments import Moments
from fvp.scalars import Scalars
from fvp.transforms.objective import Objective
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.typing import Params

_REMEMBERED = 10  # steps before which none is forgotten; docs/decisions/steps.md


class LastStep(Scalars):
    """The last step that was solved for: its length along the direction, and two inner products."""

    length: Array
    aligned: Array  # parameters before it . step
    square: Array  # step . step


class NoiseState(NamedTuple):
    """What the noise of the batches is known by, and what its steps need."""

    leads: Array  # bool; once it does it stays so
    claims: Claims
    trail: Params  # decaying sum of the steps
    last: LastStep
    learned: LearnedLength
    average: IterateAverage
    moments: Moments
    waiting: Array  # int32 scalar, gradients whose mean is the state's direction

    @classmethod
    def of(cls, params: Params) -> NoiseState:
        """Before the first step."""
        return cls(
            leads=jnp.zeros((), jnp.bool_),
            claims=Claims.zeros(),
            trail=optax.tree.zeros_like(params),
            last=LastStep.zeros(),
            learned=LearnedLength.zeros(),
            average=IterateAverage.of(params),
            moments=Moments.of(params),
            waiting=jnp.zeros((), jnp.int32),
        )


def seen_by(
    objective: Objective, state: NaturalGradientState, square: Array
) -> tuple[NoiseState, Objective]:
    """With this batch's view of the last step; and the objective that knows its loss.

    Where the ``square`` of the gradient is NaN, the batch has no loss that says anything.
    """
    noise: NoiseState = state.noise
    precision = float(jnp.finfo(objective.output_dtype).eps)
    before = jnp.where(jnp.isnan(square), jnp.nan, objective.loss_before())
    part = _part_taken(state, objective.params)
    claims = noise.claims.held_against(before, part, precision)
    return noise._replace(leads=claims.noise_leads, claims=claims), objective.knowing(before)


def with_claim(
    state: NaturalGradientState, objective: Objective, record: Step, outcome: Outcome, step: Params
) -> NoiseState:
    """With the claim of a ``step``, which is to be subtracted, and zeros if it was rejected."""
    noise: NoiseState = state.noise
    memory = jnp.where(state.count < _REMEMBERED, 1, MEMORY)
    square = tree_vdot(step, step).astype(jnp.float32)
    if_moved = lambda x: jnp.where(square > 0, x, 0)
    slope, reduction = record.length * record.slope, record.reduction - outcome.error
    return noise._replace(
        claims=noise.claims.after(objective.loss_before(), if_moved(slope), if_moved(reduction)),
        trail=jax.tree.map(
            lambda old, new: (memory * old + new).astype(old.dtype), noise.trail, step
        ),
        last=LastStep(
            length=if_moved(record.length),
            aligned=tree_vdot(objective.params, step),
            square=square,
        ),
    )


def _part_taken(state: NaturalGradientState, params: Params) -> Array:
    """How much of the last step is in ``params``: less than 1 where others have shortened it.

    1 where rounding hides it.
    """
    last: LastStep = state.noise.last
    safe = jnp.where(last.square > 0, last.square, 1)
    part = (last.aligned - last.length * tree_vdot(params, state.direction)) / safe
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)), default=0)
    unsure = 0.01 + 16 * eps * jnp.abs(last.aligned) / safe
    whole = (last.square == 0) | ~(jnp.abs(part - 1) > unsure)
    return jnp.where(whole, 1, jnp.clip(part, 0, 2)).astype(jnp.float32)


def step_back(
    options: Options, like: Params, state: NaturalGradientState
) -> tuple[Params, NaturalGradientState]:
    """Where noise begins to lead: takes back what was fitted to the batches.

    That is the last step that was solved for, or where the loss has risen all that are remembered.
    The update has the dtypes of ``like``.
    """
    noise: NoiseState = state.noise
    taken, risen = computed_once((noise.last.length, noise.claims.loss_has_risen))
    back = lambda last, trail: options.sign * jnp.where(risen, -trail, -taken * last)
    update = jax.tree.map(
        lambda last, trail, g: back(last, trail).astype(g.dtype), state.direction, noise.trail, like
    )
    update, (direction, trail) = in_order(update, (state.direction, noise.trail))
    never = computed_once(jnp.array(False))
    forgotten = jax.tree.map(lambda x: jnp.where(never, x, 0), trail)  # zeros, after the update
    return update, after_noise(
        state._replace(direction=direction),
        noise._replace(trail=forgotten, last=LastStep.zeros()),
    )


def after_noise(
    state: NaturalGradientState, noise: NoiseState, accepted: bool = True
) -> NaturalGradientState:
    """The state after a step that nothing was solved for."""
    return state._replace(
        count=optax.safe_increment(state.count),
        iterations=jnp.zeros((), jnp.int32),
        residual_norm=jnp.zeros((), jnp.float32),
        predicted_kl=jnp.zeros((), jnp.float32),
        accepted=jnp.array(accepted),
        noise=noise,
    )
