"""The measures with kfac-jax: its implicit exact curvature and its block-diagonal estimator."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax

from comparison.models import MODELS, data_of, loss_of, mean_loss
from comparison.program import DAMPING, MARGINAL, Program, Programs
from comparison.with_jax import conjugate_gradients, loop
from comparison.workloads import Workload

NO_CG = "it has no CG: JAX's, on its product"


def programs(work: Workload) -> Programs:
    """Products, and what its estimator does."""
    kfac_jax = importlib.import_module("kfac_jax")
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)
    key = jax.random.PRNGKey(0)
    tokens = math.prod(work.y.shape[1:]) if work.head == "softmax" else 1
    batch_size = work.x.shape[0]

    def loss(params: Any, batch: Any) -> Any:
        z = model(params, batch[0])
        if work.head == "softmax":  # its curvature adds up the tokens of an example
            register = kfac_jax.register_softmax_cross_entropy_loss
            register(z, batch[1], weight=1.0 / tokens)
        else:
            kfac_jax.register_squared_error_loss(z, batch[1], weight=0.5)
        return loss_of(work.head, z, batch[1])

    exact = kfac_jax.ImplicitExactCurvature(loss)
    multiply = lambda p, batch: lambda u: exact.multiply_fisher((p, batch), u)

    def estimate(mode: str) -> tuple[Any, Callable[..., Any]]:
        """An estimator, and a function from parameters and batch to its state after a batch."""
        estimator = kfac_jax.BlockDiagonalCurvature(loss, default_estimation_mode=mode)
        powers = {"exact_powers_to_cache": -1, "approx_powers_to_cache": None}

        def state(p: Any, batch: Any, key: Any) -> Any:
            empty = estimator.init(key, (p, batch), **powers)
            weights = {"ema_old": 0.0, "ema_new": 1.0, "identity_weight": 0.0}
            return estimator.update_curvature_matrix_estimate(
                empty, **weights, batch_size=batch_size, rng=key, func_args=(p, batch)
            )

        return estimator, state

    # Made where it is asked for: what it can't trace is an error of that measure alone.
    estimators: dict[str, Any] = {}

    def factors(mode: str) -> Callable[..., Any]:
        def program(p: Any, batch: Any, key: Any) -> Any:
            estimators[mode], state = estimate(mode)
            return state(p, batch, key)

        return program

    def of_state(power: int) -> Program:
        def program(state: Any, v: Any) -> Any:
            options = {"identity_weight": DAMPING if power < 0 else 0.0, "exact_power": True}
            return estimators["fisher_exact"].multiply_matpower(
                state, v, power=power, use_cached=False, pmap_axis_name=None, **options
            )

        return Program(program, lambda: (jax.jit(factors("fisher_exact"))(*batch_and_key()), v))

    data = lambda: (params, (x, y), v)
    batch_and_key = lambda: (params, (x, y), key)
    measures: dict[str, Program | str] = {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(lambda p, batch, v: multiply(p, batch)(v), data),
        MARGINAL: Program(lambda p, batch, v, count: loop(multiply(p, batch), v, count), data),
        "ten CG iterations": Program(
            lambda p, batch, v: conjugate_gradients(multiply(p, batch), v), data, note=NO_CG
        ),
        "K-FAC factors": Program(factors("fisher_exact"), batch_and_key),
        "K-FAC factors, Monte Carlo": Program(factors("fisher_gradients"), batch_and_key),
        "K-FAC product": of_state(1),
        "K-FAC solve": of_state(-1),
    }
    return measures
