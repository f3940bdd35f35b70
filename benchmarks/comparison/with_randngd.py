"""The measures with randngd: Gramians of least squares, from Jacobians or in batches."""

from __future__ import annotations

import importlib
import os
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

from comparison.models import MODELS, data_of, mean_loss
from comparison.program import DAMPING, ITERATIONS, MARGINAL, Program, Programs
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Products with precomputed Jacobians, its fastest; float32 as the others, by its switch."""
    if work.head != "gaussian":
        return {"product": "its Gramians are of least squares"}
    os.environ["RANDNGD_ENABLE_X64"] = "0"
    library = importlib.import_module("randngd")
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)
    unravel = ravel_pytree(params)[1]
    jacobian = library.jacobians.jacobian_fn(lambda p, x: model(p, x[None])[0], (params,))
    ravel = lambda tree: ravel_pytree(tree)[0]

    def gramian(p: Any, x: Any, diagonal: bool = False) -> Any:
        J = jacobian(p, x=x)
        return library.Gramian.from_jacobians([(J, 1.0 / len(x))], work.size, diagonal)

    def loop(p: Any, x: Any, v: Any, count: Any) -> Any:
        G = gramian(p, x)
        return unravel(jax.lax.fori_loop(0, count, lambda _, u: u + G.vp(u), ravel(v)))

    def cg(p: Any, x: Any, v: Any) -> Any:
        solver = library.ConjugateGradient(maxiter=ITERATIONS, kappa=0.0)
        return unravel(solver.solve(gramian(p, x), DAMPING, ravel(v)))

    data = lambda: (params, x, v)
    return {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(lambda p, x, v: unravel(gramian(p, x).vp(ravel(v))), data),
        MARGINAL: Program(loop, data, note="with the Jacobian in memory"),
        "ten CG iterations": Program(cg, data),
        "diagonal": Program(lambda p, x: unravel(gramian(p, x, True).diag()), lambda: (params, x)),
        "dual solve": "it solves in the space of the parameters",
    }
