"""One step: direction, length, trial, verdict; and what is kept of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control import Observation, Outcome, Step
from fvp.control.record import unknown_outcome
from fvp.control.trial import divergence_outcome, loss_outcome
from fvp.numerics import (
    as_finite,
    cast_like,
    tree_norm,
    tree_vdot,
    tree_where,
    tree_zeros_like,
    unit,
)
from fvp.solvers import DampedCurvature, Moment, Verdict
from fvp.transforms.direction import Direction, find_direction
from fvp.transforms.length import Length, Moves, choose_length
from fvp.transforms.objective import Objective
from fvp.transforms.options import Options
from fvp.transforms.state import NaturalGradientState
from fvp.transforms.watch import with_claim
from fvp.typing import Params, PyTree

# Where nothing can try an adaptive step, for want of a batch; docs/decisions/steps.md
UNTRIED_DAMPING = 4.0


class Attempt(NamedTuple):
    """A step that was found and tried."""

    gradient: Params  # of the loss with its l2 term
    norm: Array  # of that
    control: PyTree  # the state of the rule that has seen it
    solver: PyTree  # the state of the solver that has prepared for it
    damping: Any  # that the solver took
    direction: Direction
    length: Length
    record: Step
    outcome: Outcome
    lost: Array  # bool: the solve broke down before it descended, on a gradient that is sound


def take_step(
    options: Options, gradient: Params, state: NaturalGradientState, objective: Objective
) -> tuple[Params, NaturalGradientState]:
    """Direction, length, trial, verdict; and the next state."""
    attempt = _attempt(options, gradient, state, objective)
    descent, outcome, record = attempt.direction.descent, attempt.outcome, attempt.record
    accepted = descent & ~outcome.worse & (record.length != 0)
    control = options.rule.correct(attempt.control, record, outcome, accepted)
    verdict = Verdict(
        sound=descent | attempt.lost,
        # A gradient that is zero or not finite, or a loss that was not finite before the step, says
        # nothing about damping.
        informative=(descent & ((record.scale > 0) | attempt.length.stuck)) | attempt.lost,
        good=accepted & ~attempt.direction.info.converged & options.rule.agrees(control),
        noisy=options.rule.noisy(control),
    )
    seen = tree_where(verdict.sound, attempt.control, state.control)
    bent = attempt.length.step
    step = attempt.direction.path.step(record.length) if bent is None else bent
    step = tree_where(accepted, step, tree_zeros_like(step))
    update = jax.tree.map(lambda x: (options.sign * x).astype(x.dtype), step)
    damping = jnp.where(jnp.isfinite(attempt.damping), attempt.damping, state.damping)
    predicted_kl = jnp.where(accepted, attempt.length.predicted_kl, 0)
    info, mismatch = attempt.direction.info, state.gradient_mismatch
    if options.tries and objective.data.tries_nll:
        asked = descent & outcome.worse
        differs = lambda: _gradient_differs(objective, gradient, attempt)
        if options.rule.needs_direct:  # a backward pass is little beside the factorisation
            mismatch = jnp.where(asked, differs(), mismatch)
        else:
            mismatch = jax.lax.cond(asked, differs, lambda: state.gradient_mismatch)
    noise = state.noise
    if noise is not None and objective.data.has_loss:
        noise = with_claim(state, objective, record, outcome, step)
    return update, NaturalGradientState(
        count=optax.safe_increment(state.count),
        direction=_kept_direction(state.direction, attempt, accepted),
        control=tree_where(verdict.informative, control, seen),
        solver=options.solver.correct(state.solver, attempt.solver, verdict),
        damping=damping.astype(jnp.float32),
        iterations=info.iterations,
        residual_norm=as_finite(info.residual_norm.astype(jnp.float32)),
        predicted_kl=as_finite(predicted_kl.astype(jnp.float32)),
        accepted=accepted,
        gradient_mismatch=mismatch,
        noise=noise,
    )


def _attempt(
    options: Options, gradient: Params, state: NaturalGradientState, objective: Objective
) -> Attempt:
    """Finds a step, and tries it."""
    slope_of = objective.gradient_with_penalty(gradient)
    norm = tree_norm(slope_of)
    control, damped = _damped(options, objective, state, slope_of, norm)
    moment = Moment(state.count, norm, objective.data.targets, ~state.accepted)
    system, solver = options.solver.prepare(damped, moment, state.solver)
    if options.rule.needs_direct and not system.direct:
        raise ValueError(
            'damping: line_search="loss" goes without, which only an exact solver can, but the'
            f' system is a {type(system).__name__} (solver="auto" takes "cg" for large shapes);'
            ' pass damping=, or solver="dual".'
        )
    momentum = _momentum(options, control, state.count)
    direction = find_direction(options, system, slope_of, state.direction, momentum)
    moves = Moves(objective.params, direction.path, gradient)
    rate = options.rate(state.count)
    length = choose_length(options, objective, system, direction, moves, rate)
    record = Step(
        slope=direction.slope,
        curvature=direction.curvature + _penalty_curvature(options, direction.path.direction),
        damping_term=direction.damping_term,
        length=length.length,
        damping=system.damped.damping,
        part=length.part,
    )
    outcome = _try(options, objective, record, length, moves)
    # Where no length is short enough, or the solve was lost, the step failed like any other:
    # damping has to grow, or nothing ever changes.
    # Without damping even a solve that is not finite is what damping would have been for.
    sound = jnp.isfinite(norm) & (norm > 0)
    if not options.rule.needs_direct:
        sound &= jnp.isfinite(direction.info.residual_norm)
    lost = (options.rule.adapts | options.rule.needs_direct) & ~direction.descent & sound
    failed = length.stuck | lost
    outcome = outcome._replace(
        error=jnp.where(failed, jnp.inf, outcome.error), worse=outcome.worse | failed
    )
    return Attempt(
        gradient=slope_of,
        norm=norm,
        control=control,
        solver=solver,
        damping=jnp.asarray(system.damped.damping),
        direction=direction,
        length=length,
        record=record,
        outcome=outcome,
        lost=lost,
    )


def _damped(
    options: Options,
    objective: Objective,
    state: NaturalGradientState,
    gradient: Params,
    norm: Array,
) -> tuple[PyTree, DampedCurvature]:
    """The state of the rule that has seen the gradient, and the system that it asks for."""
    shift = 0.0 if options.l2 is None else options.l2
    rayleigh = lambda: objective.operator.quadratic_form(unit(gradient, norm)) + shift
    observation = Observation(state.count, gradient, norm, state.direction, rayleigh)
    control, damping = options.rule.propose(state.control, observation)
    if options.rule.adapts and objective.data.batch is None:
        damping = UNTRIED_DAMPING * damping
    diagonal = options.rule.diagonal(control) if options.solver.takes_diagonal else None
    return control, DampedCurvature(objective.operator, damping, diagonal, options.l2)


def _momentum(options: Options, control: PyTree, count: Array) -> Any:
    """How much of the last direction enters the right-hand side; None for nothing."""
    momentum = options.momentum
    if isinstance(momentum, str):
        return None if options.plane else options.rule.momentum(control, count)
    return momentum(count) if callable(momentum) else momentum


def _penalty_curvature(options: Options, direction: Params) -> Any:
    """D . l2 d."""
    return 0.0 if options.l2 is None else options.l2 * tree_vdot(direction, direction)


def _try(
    options: Options, objective: Objective, record: Step, length: Length, moves: Moves
) -> Outcome:
    """Tries the step on the loss where there is one, else on the divergence that it makes."""
    if not options.tries or objective.problem is None:
        return unknown_outcome(record)
    if objective.data.has_loss:
        after = lambda a: objective.loss(moves(a)) if length.loss is None else length.loss
        return loss_outcome(record, objective.loss_before(), after)
    divergence = objective.divergence(moves(record.length))
    return divergence_outcome(record, length.predicted_kl, divergence)


def _gradient_differs(objective: Objective, gradient: Params, attempt: Attempt) -> Array:
    """Whether a rejected step's gradient was that of another loss."""
    # The loss is rounded by that much along the step.
    rounding = attempt.outcome.rounding
    rounding = jnp.where(jnp.isfinite(rounding), rounding, 0)
    least = rounding / jnp.abs(attempt.record.length)
    return objective.gradient_differs(gradient, attempt.direction.path.direction, least)


def _kept_direction(previous: Params | None, attempt: Attempt, accepted: Array) -> Params | None:
    """The direction that the next step reads.

    A bad batch leaves momentum and warm start alone. A step that failed its trial ends them, and so
    does a sound solve without descent: it started too far off, and always would.
    """
    if previous is None:
        return None
    direction = attempt.direction
    failed = direction.descent | ~direction.info.breakdown | attempt.lost
    kept = tree_where(~accepted & failed & (attempt.norm > 0), tree_zeros_like(previous), previous)
    return tree_where(accepted, cast_like(direction.path.direction, previous), kept)
