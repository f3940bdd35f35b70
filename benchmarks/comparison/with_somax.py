"""The measures with python-somax: its curvature operators, solvers and estimator."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from comparison.models import MODELS, data_of, mean_loss
from comparison.program import DAMPING, DUAL_DAMPING, ITERATIONS, MARGINAL, Program, Programs
from comparison.with_jax import add, loop
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Products, CG, the sampled diagonal, and the solve in the space of rows where it is right."""
    part = lambda name: importlib.import_module(f"somax.{name}")
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)
    flat = lambda p, x: (z := model(p, x)).reshape(-1, z.shape[-1])
    if work.head == "softmax":
        curvature = part("curvature.ggn_ce").GGNCE(predict_fn=flat)
    else:
        curvature = part("curvature.ggn_mse").GGNMSE(predict_fn=model)
    batch = {"x": x, "y": y.reshape(-1) if work.head == "softmax" else y}

    def multiply(p: Any, batch: Any) -> Any:
        state, _ = curvature.init(p, batch)
        return lambda u: curvature.matvec(p, state, u)

    def cg(p: Any, batch: Any, v: Any) -> Any:
        options: Any = {"maxiter": ITERATIONS, "tol": 0.0, "warm_start": False}
        solver = part("solvers.cg").ConjugateGradient(**options, stabilise_every=0)
        product = multiply(p, batch)
        damped = lambda u: add(product(u), u, DAMPING)
        return solver.solve(damped, v, state=solver.init(p))[0]

    def diagonal(p: Any, batch: Any, key: Any) -> Any:
        state, _ = curvature.init(p, batch)
        estimator = part("estimators.gnb_ce").GaussNewtonBartlett(n_samples=1)
        return estimator.diagonal(p, state, multiply(p, batch), key)

    def dual(p: Any, batch: Any, v: Any) -> Any:
        # Its step's right-hand side is the residual; here it is J v, as Woodbury's formula has it.
        state, _ = curvature.init(p, batch)
        rows = curvature.row_op(p, state, batch)
        bound = part("solvers.row_common").bind_row_system
        product, _, back, _ = bound(row_op=rows, lam=jnp.float32(DUAL_DAMPING), reduction="mean")
        solver = part("solvers.row_cholesky").RowCholesky()
        u = solver.solve(product, rows.jvp(v), state=solver.init(p))[0]
        return jax.tree.map(lambda v, b: (v - b) / DUAL_DAMPING, v, back(u))

    data = lambda: (params, batch, v)
    measures: dict[str, Program | str] = {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(lambda p, batch, v: multiply(p, batch)(v), data),
        MARGINAL: Program(lambda p, batch, v, count: loop(multiply(p, batch), v, count), data),
        "ten CG iterations": Program(cg, data),
        "dual solve": Program(dual, data),
    }
    if work.head == "softmax":
        measures["dual solve"] = "its rows for this head have L in place of L^T"
        measures["Monte Carlo diagonal"] = Program(
            diagonal,
            lambda: (params, batch, jax.random.key(0)),
            note="from the mean gradient of the sampled labels: noisier",
        )
    return measures
