"""The transformations: what optax calls, and the loss of a batch that it calls them with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fvp.checks import check_arrays, check_like
from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator, Problem
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.operator import build_operator
from fvp.numerics import in_order, tree_vdot
from fvp.solvers import Setting
from fvp.tracing.work import multiplications
from fvp.transforms.noise import (
    gradients_for_one_step,
    is_sound,
    makes_a_step,
    mean_gradient,
    no_step,
    noise_step,
    wait,
)
from fvp.transforms.objective import Data, Objective, with_penalty
from fvp.transforms.options import Options, check_data
from fvp.transforms.serialization import register_with_flax
from fvp.transforms.state import NaturalGradientState
from fvp.transforms.step import take_step
from fvp.transforms.subset import has_masked_nodes
from fvp.transforms.watch import NoiseState, seen_by, step_back
from fvp.typing import Params


def build_transform(options: Options) -> optax.GradientTransformationExtraArgs:
    """``init`` and ``update``; compiled when called eagerly."""

    def init(params: Params) -> NaturalGradientState:
        register_with_flax()
        check_arrays(params, "params")
        problem = lambda params, batch: problem_at(options, params, Data(batch))
        setting = Setting(params, options.rule.adapts, problem)
        # One array for each field: a buffer that stands in two places cannot be donated.
        return NaturalGradientState(
            count=jnp.zeros((), jnp.int32),
            direction=optax.tree.zeros_like(params) if options.keeps_direction else None,
            control=options.rule.init(params),
            solver=options.solver.init(setting),
            damping=jnp.zeros((), jnp.float32),
            iterations=jnp.zeros((), jnp.int32),
            residual_norm=jnp.zeros((), jnp.float32),
            predicted_kl=jnp.zeros((), jnp.float32),
            accepted=jnp.zeros((), jnp.bool_),
            gradient_mismatch=jnp.zeros((), jnp.bool_),
            noise=NoiseState.of(params) if options.minds_noise else None,
        )

    @compiled_when_eager
    def step(
        gradient: Params, state: NaturalGradientState, params: Params, operator: Any, data: Data
    ) -> tuple[Params, NaturalGradientState]:
        def solved() -> tuple[Params, NaturalGradientState]:
            objective = objective_at(options, params, operator, data)
            if state.noise is None or not data.has_loss:
                return take_step(options, gradient, state, objective)
            noise, knowing = seen_by(objective, state, square)
            seen = state._replace(noise=noise)
            back = lambda: step_back(options, gradient, seen)
            on = lambda: take_step(options, gradient, seen, knowing)
            return jax.lax.cond(noise.leads, back, on)

        if state.noise is None:
            return solved()
        # Where noise leads nothing has to be tried: the model is evaluated in one branch alone.
        slope_of = with_penalty(gradient, params, options.l2)
        square = tree_vdot(slope_of, slope_of)
        number = gradients_for_one_step(slope_of, forward_work(options, params, data))

        def led() -> tuple[Params, NaturalGradientState]:
            if number == 1:
                # What waits from smaller batches is left out, as the few examples that it is.
                alone = state.noise._replace(waiting=jnp.zeros((), jnp.int32))
                one = state._replace(noise=alone)
                return noise_step(options, slope_of, square, gradient, one, number)
            mean, kept = in_order(mean_gradient(slope_of, state), state.direction)
            after = state._replace(direction=kept)
            return noise_step(options, mean, tree_vdot(mean, mean), gradient, after, number)

        branches = [solved, lambda: no_step(gradient, state), led]
        which = jnp.where(state.noise.leads, jnp.where(is_sound(square), 2, 1), 0)
        if number > 1:
            branches.append(lambda: wait(slope_of, gradient, state))
            which += (which == 2) & ~makes_a_step(number, state.noise)
        return jax.lax.switch(which, branches)

    def update(
        updates: Params,
        state: NaturalGradientState,
        params: Params | None = None,
        *,
        operator: CurvatureOperator | None = None,
        **keywords: Any,
    ) -> tuple[Params, NaturalGradientState]:
        if params is None:
            raise ValueError("params: expected the parameters, got None; tx.update(g, s, params).")
        data = Data(**{name: keywords.get(name) for name in Data._fields})
        if operator is None:
            check_data(params, data, options.curvature)
        gradient = check_like(updates, params, "updates", "params", cast=False)
        if not options.tries or data.value_fn is None:
            data = data._replace(value=None, value_fn=None)
        return step(gradient, state, params, operator, data)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def problem_at(options: Options, params: Params, data: Data) -> Problem:
    """The loss at a batch, of all parameters or of those that are not masked."""
    model, axes, batch = options.model_fn, options.batch_axes, data.batch
    if has_masked_nodes(params):
        if data.all_params is None:
            raise ValueError(
                "example_batch: init sees the unmasked parameters alone, under optax.masked and"
                " optax.partition; leave it out, and the factors are those of each batch."
            )
        model, axes, batch = options.on_subset, (axes, None), (batch, data.all_params)
    return Problem.of(
        model,
        options.head,
        params,
        batch,
        targets=data.targets,
        weights=data.weights,
        batch_axes=axes,
        axis_name=options.axis_name,
    )


def forward_work(options: Options, params: Params, data: Data) -> int:
    """Multiplications of the model's forward pass on the batch; 0 where there is none."""
    if data.batch is None:
        return 0
    problem = problem_at(options, params, data)
    return multiplications(problem.outputs, problem.params)


def objective_at(options: Options, params: Params, operator: Any, data: Data) -> Objective:
    """What steps are tried on; builds the ``operator`` where the caller has not."""
    problem = None if data.batch is None else problem_at(options, params, data)
    if operator is None:
        assert problem is not None
        linearize, read = gauss_newton_of(options.curvature), problem
        if options.curvature.reads_targets is False:
            read = dataclasses.replace(problem, targets=None)
        operator = build_operator(linearize, read, options.chunk_size)
    return Objective(operator, params, problem, data, options.l2)
