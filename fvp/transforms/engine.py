"""The transformation behind the public ones: solve, control the step, try it, keep what it said."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.checks import check_like
from fvp.compilation import compiled_when_eager
from fvp.control import Step
from fvp.control.budget import Budget
from fvp.control.fixed import FixedDamping
from fvp.control.momentum import best_of_plane, spring_rhs
from fvp.control.record import unknown_outcome
from fvp.control.trust_region import length_within_kl
from fvp.curvature import CurvatureOperator
from fvp.numerics import (
    as_finite,
    cast_like,
    tree_axpy,
    tree_is_finite,
    tree_norm,
    tree_vdot,
    tree_where,
    unit,
    wide_dtype,
    widen,
)
from fvp.solvers import CGSystem, ExactSystem, choose_solver
from fvp.transforms.geodesic import geodesic_correction
from fvp.transforms.options import CURVATURES, Data, Options, check_data
from fvp.transforms.subset import has_masked_nodes
from fvp.transforms.trying import (
    Path,
    divergence,
    gradient_differs,
    moves,
    search_length,
    try_step,
)

WARM_START_DECAY = 0.95
# Least damping of an exact solve over the norm of the gradient: below, where the curvature vanishes
# in float32, the squared norm of the solution would overflow.
LEAST = 2.0**-60
# Where no loss can try an adaptive step: a bound on its KL; without a batch, also more damping.
UNTRIED_KL, UNTRIED_DAMPING = 0.1, 4.0
RETRIED_DAMPING = 4.0  # over that of the step that failed, where none was given


class NaturalGradientState(NamedTuple):
    """State of :func:`fvp.scale_by_fisher` and :func:`fvp.natural_gradient`."""

    count: Any  # int32 scalar, updates done
    direction: Any  # like the parameters, the last solution: warm start and momentum; or None
    control: Any  # state of the adaptive damping; or None
    budget: Any  # Budget of CG; or None
    damping: Array  # float32 scalar, of the last step
    iterations: Array  # int32 scalar, CG iterations of the last step
    residual_norm: Array  # float32 scalar, of the last solve
    predicted_kl: Array  # float32 scalar, 1/2 s^T (curvature) s for the step s; 0 if rejected
    accepted: Array  # bool scalar; a step that was not is zeros
    gradient_mismatch: Array  # bool scalar, what the last rejected step found, see scale_by_fisher


def build_transform(options: Options) -> optax.GradientTransformationExtraArgs:
    """``init`` and ``update``; compiled when called eagerly."""

    def init(params: Any) -> NaturalGradientState:
        # One array for each field: a buffer that stands in two places cannot be donated.
        return NaturalGradientState(
            count=jnp.zeros((), jnp.int32),
            direction=optax.tree.zeros_like(params) if options.keeps_direction else None,
            control=None if isinstance(options.rule, FixedDamping) else options.rule.init(params),
            budget=Budget.first() if options.adapts_budget else None,
            damping=jnp.zeros((), jnp.float32),
            iterations=jnp.zeros((), jnp.int32),
            residual_norm=jnp.zeros((), jnp.float32),
            predicted_kl=jnp.zeros((), jnp.float32),
            accepted=jnp.zeros((), jnp.bool_),
            gradient_mismatch=jnp.zeros((), jnp.bool_),
        )

    @compiled_when_eager
    def step(gradient: Any, state: NaturalGradientState, params: Any, operator: Any, data: Data):
        return _step(options, gradient, state, params, operator, data)

    def update(
        updates: Any,
        state: NaturalGradientState,
        params: Any = None,
        *,
        batch: Any = None,
        targets: Any = None,
        weights: Any = None,
        operator: CurvatureOperator | None = None,
        all_params: Any = None,
        value: Any = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, NaturalGradientState]:
        del extra_args
        if params is None:
            raise ValueError("params: expected the parameters, got None; tx.update(g, s, params).")
        if operator is None:
            check_data(params, batch, targets, all_params, options.curvature)
        gradient = check_like(updates, params, "updates", "params", cast=False)
        if not options.tries or value_fn is None:
            value = value_fn = None
        data = Data(batch, targets, weights, all_params, value, value_fn)
        return step(gradient, state, params, operator, data)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _step(
    options: Options,
    gradient: Any,
    state: NaturalGradientState,
    params: Any,
    operator: Any,
    data: Data,
) -> tuple[Any, NaturalGradientState]:
    """Direction, length, trial, verdict."""
    if operator is None:
        operator = _build_operator(options, params, data)
    previous, l2 = state.direction, options.l2
    slope_of = gradient if l2 is None else tree_axpy(l2, cast_like(params, gradient), gradient)
    shift, norm = 0.0 if l2 is None else l2, tree_norm(slope_of)
    solver = choose_solver(operator) if options.solver == "auto" else options.solver
    if options.exact_only and solver == "cg":
        raise ValueError(
            'damping: line_search="loss" goes without, which only an exact solver can, but'
            ' solver="auto" takes "cg" for these shapes; pass damping=, or solver="dual".'
        )
    control, budget, metric = None, state.budget, None
    if isinstance(options.rule, FixedDamping):
        strength = jnp.asarray(options.rule.at(state.count))
        if options.exact_only:  # where not even a search helped, the solve was all rounding
            again = (state.count > 0) & ~state.accepted
            strength = jnp.where(again, RETRIED_DAMPING * state.damping, strength)
    else:
        rayleigh = lambda: operator.quadratic_form(unit(slope_of)) + shift
        control, strength = options.rule.observe(state.control, slope_of, norm, previous, rayleigh)
        budget = None if budget is None else budget.observe(norm)
        # The exact solvers take damping I.
        metric = options.rule.metric(control) if solver == "cg" else None
        if data.batch is None:
            strength = UNTRIED_DAMPING * strength

    # The direction.
    rhs, start = slope_of, None
    if options.spring:
        momentum = _momentum(options, control, state.count)
        rhs = spring_rhs(slope_of, _damp(strength, metric, previous), momentum)
        start = jax.tree.map(lambda d: (momentum * d).astype(d.dtype), previous)
    elif options.warm_start:
        start = jax.tree.map(lambda d: (WARM_START_DECAY * d).astype(d.dtype), previous)
    system = _system(options, solver, operator, strength, metric, budget, data.targets, norm)
    if isinstance(system, ExactSystem):
        strength = system.damping
    solution, info = system.solve(rhs, start, data.targets)
    descent = jnp.isfinite(info.residual_norm) & (info.model_value < 0)
    curvature, damping_term = info.curvature, info.damping_term
    if options.plane:
        damp = lambda v: tree_axpy(shift, v, _damp(strength, metric, v))
        solution, curvature = best_of_plane(operator, damp, slope_of, solution, previous)
        damping_term = tree_vdot(solution, _damp(strength, metric, solution))
        descent &= tree_is_finite(solution)
    correction = None
    if options.geodesic:
        searched = options.line_search == "loss"
        correction = geodesic_correction(
            operator, system.solve_outputs, solution, searched=searched
        )
    path = Path(solution, correction)

    # Its length, and what trying it says.
    length, sign = _learning_rate(options, state.count)
    predicted_kl = jnp.maximum(0.5 * jnp.square(length) * curvature, 0)  # never below by rounding
    at = moves(params, path, gradient, length)
    limit = options.max_kl
    if limit is None and options.adaptive and not data.has_loss:
        limit = UNTRIED_KL
    stuck = jnp.array(False)
    if limit is not None:
        exact = None
        if data.batch is not None:
            exact = lambda a: divergence(options, operator, at(a), data)
        shrink = length_within_kl(predicted_kl, limit, exact, constant=options.constant_kl)
        stuck = shrink == 0
        length, predicted_kl = shrink * length, jnp.square(shrink) * predicted_kl
        at = moves(params, path, gradient, length)
    after = None
    if options.line_search is not None:
        shrink, after = search_length(options, operator, params, solution, length, at, data)
        length, predicted_kl = shrink * length, jnp.square(shrink) * predicted_kl
        at = moves(params, path, gradient, length)
    record = Step(
        slope=tree_vdot(slope_of, solution),
        curvature=curvature if l2 is None else curvature + l2 * tree_vdot(solution, solution),
        damping_term=damping_term,
        length=jnp.asarray(length),
    )
    outcome = unknown_outcome(record)
    if options.adaptive or options.line_search is not None:
        outcome = try_step(options, operator, params, at, record, predicted_kl, data, after)
    # Where no length is short enough, or the solve broke down before it descended, on a gradient
    # that is sound, the step failed like any other: damping has to grow, or nothing ever changes.
    lost = options.adaptive & ~descent & jnp.isfinite(info.residual_norm + norm) & (norm > 0)
    failed = stuck | lost
    outcome = outcome._replace(
        error=jnp.where(failed, jnp.inf, outcome.error), worse=outcome.worse | failed
    )
    accepted = descent & ~outcome.worse & (length != 0)
    if not isinstance(options.rule, FixedDamping) and control is not None:
        # A gradient that is zero or not finite, or a loss that was not finite before the step, says
        # nothing about damping.
        corrected = options.rule.correct(control, record, outcome, accepted)
        short = accepted & ~info.converged & options.rule.agrees(control)
        noisy = options.rule.noisy(control)
        resized = None if budget is None else budget.correct(short=short, noisy=noisy)
        informative = (descent & ((record.scale > 0) | stuck)) | lost
        seen = tree_where(descent | lost, (control, budget), (state.control, state.budget))
        control, budget = tree_where(informative, (corrected, resized), seen)
    mismatch = state.gradient_mismatch
    if options.tries and data.tries_nll:
        rejected = descent & outcome.worse
        differs = lambda: gradient_differs(
            operator, gradient, solution, length, outcome, data.targets
        )
        mismatch = jax.lax.cond(rejected, differs, lambda: mismatch)
    step = path.step(length)
    update = jax.tree.map(lambda x: jnp.where(accepted, sign * x, 0).astype(x.dtype), step)
    direction = previous
    if direction is not None:
        # A bad batch leaves momentum and warm start alone. A step that failed its trial ends them,
        # and so does a sound solve without descent: it started too far off, and always would.
        ended = ~accepted & (descent | ~info.breakdown | lost) & (norm > 0)
        kept = tree_where(ended, _zeros(direction), direction)
        direction = tree_where(accepted, cast_like(solution, direction), kept)
    return update, NaturalGradientState(
        count=optax.safe_increment(state.count),
        direction=direction,
        control=control,
        budget=budget,
        damping=jnp.where(jnp.isfinite(strength), strength, state.damping).astype(jnp.float32),
        iterations=info.iterations,
        residual_norm=as_finite(info.residual_norm.astype(jnp.float32)),
        predicted_kl=as_finite(jnp.where(accepted, predicted_kl, 0).astype(jnp.float32)),
        accepted=accepted,
        gradient_mismatch=mismatch,
    )


def _system(
    options: Options,
    solver: str,
    operator: Any,
    strength: Any,
    metric: Any,
    budget: Budget | None,
    targets: Any,
    norm: Array,
) -> CGSystem | ExactSystem:
    """The system curvature + strength D + l2 I; D = I without a metric."""
    if solver == "cg":
        maxiter = options.maxiter if budget is None else budget.iterations
        return CGSystem(operator, strength, options.l2, metric, options.tol, maxiter)
    shift = 0.0 if options.l2 is None else options.l2
    return ExactSystem.of(solver, operator, strength, shift, targets, norm * LEAST)


def _damp(strength: Any, metric: Any, v: Any) -> Any:
    """Strength D v in float32 or wider; D = I without a metric."""
    strength = jnp.asarray(strength)
    scaled = jax.tree.map(lambda x: strength.astype(wide_dtype(x.dtype)) * widen(x), v)
    if metric is None:
        return scaled
    return jax.tree.map(lambda x, d: x * d.astype(x.dtype), scaled, metric)


def _momentum(options: Options, control: Any, count: Any) -> Any:
    """How much of the last direction enters the right-hand side."""
    momentum = options.momentum
    if isinstance(momentum, str) and not isinstance(options.rule, FixedDamping):
        return options.rule.momentum(control, count)
    return momentum(count) if callable(momentum) else momentum


def _learning_rate(options: Options, count: Any) -> tuple[Any, float]:
    """How far along the direction, and the sign of the update that is returned."""
    rate = options.learning_rate
    if rate is None:
        return 1.0, 1.0
    return jnp.asarray(rate(count) if callable(rate) else rate), -1.0


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _build_operator(options: Options, params: Any, data: Data) -> Any:
    model, axes, batch = options.model_fn, options.batch_axes, data.batch
    if has_masked_nodes(params):
        model, axes, batch = options.on_subset, (axes, None), (batch, data.all_params)
    labels = () if options.curvature == "fisher" else (data.targets,)
    return CURVATURES[options.curvature](
        model,
        options.head,
        params,
        batch,
        *labels,
        weights=data.weights,
        chunk_size=options.chunk_size,
        batch_axes=axes,
        axis_name=options.axis_name,
    )
