"""The measures with fvp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import fvp
from comparison.models import MODELS, data_of, mean_loss
from comparison.program import DAMPING, DUAL_DAMPING, ITERATIONS, MARGINAL, Program, Programs
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """All measures."""
    model = MODELS[work.kind]
    head = fvp.Softmax() if work.head == "softmax" else fvp.Gaussian()
    params, x, y, v = data_of(work)
    key = jax.random.key(0)
    fisher = lambda p, x: fvp.fisher(model, head, p, x)
    kfac = lambda p, x, **options: fvp.kfac(model, head, p, x, **options)

    def loop(p: Any, x: Any, v: Any, count: Any) -> Any:
        F = fisher(p, x)
        return jax.lax.fori_loop(0, count, lambda _, v: jax.tree.map(jnp.add, v, F @ v), v)

    def cg(operator: Any, v: Any) -> Any:
        return fvp.cg(operator, v, damping=DAMPING, tol=0, maxiter=ITERATIONS)[0]

    data = lambda: (params, x)
    product = lambda: (params, x, v)
    sampled = lambda: (params, x, v, key)
    # Exact factors take a backward pass for each class, and for each token where attention is.
    label = {"key": key} if work.kind == "transformer" else {}
    factored = lambda: (jax.jit(lambda p, x: kfac(p, x, **label))(params, x), v)
    measures: dict[str, Program | str] = {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(
            lambda p, x, v: fvp.fisher_vector_product(model, head, p, x, v), product
        ),
        MARGINAL: Program(loop, product),
        "Monte Carlo product": Program(
            lambda p, x, v, key: fvp.mc_fisher(model, head, p, x, key) @ v, sampled
        ),
        "quadratic form": Program(lambda p, x, v: fisher(p, x).quadratic_form(v), product),
        "ten CG iterations": Program(lambda p, x, v: cg(fisher(p, x), v), product),
        "diagonal": Program(lambda p, x: fvp.fisher_diagonal(model, head, p, x), data),
        "Monte Carlo diagonal": Program(
            lambda p, x, key: fvp.fisher_diagonal(model, head, p, x, key=key),
            lambda: (params, x, key),
        ),
        "K-FAC factors": Program(kfac, data),
        "K-FAC factors, Monte Carlo": Program(
            lambda p, x, key: kfac(p, x, key=key), lambda: (params, x, key)
        ),
        "K-FAC product": Program(lambda K, v: K @ v, factored),
        "K-FAC solve": Program(lambda K, v: K.solve(v, DAMPING), factored),
        "EK-FAC product": Program(
            lambda p, x, v: kfac(p, x, eigenvalue_corrected=True) @ v, product
        ),
        "dual solve": Program(
            lambda p, x, v: fvp.solve_dual(fisher(p, x), v, DUAL_DAMPING), product
        ),
    }
    if work.kind == "transformer":
        rows = work.rows * work.params["out"].shape[-1]
        measures["dual solve"] = f"a matrix of {rows:,} rows"
        for name in ("diagonal", "K-FAC factors", "EK-FAC product"):
            measures[name] = f"{rows:,} backward passes: tokens meet in attention"
    if work.kind == "regression":
        log_prob = lambda p, x: model(p, x)[0]
        scores = lambda p, x: fvp.score_fisher(log_prob, p, x)
        measures["score product"] = Program(lambda p, x, v: scores(p, x) @ v, product)
        measures["score CG"] = Program(lambda p, x, v: cg(scores(p, x), v), product)
    return measures
