"""The measures with nlls-gram: the linear solves of its Levenberg-Marquardt steps."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from comparison.models import MODELS, data_of, mean_loss
from comparison.program import DAMPING, DUAL_DAMPING, ITERATIONS, Program, Programs
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Solves without the trial of the step, which ``update`` would add.

    A solver makes -(J^T J + damping I)^-1 J^T r of a residual r. With r = -J v that is the part of
    Woodbury's formula which costs.
    """
    if work.head != "gaussian":
        return {"product": "it solves least squares"}
    library = importlib.import_module("nlls_gram")
    problem = importlib.import_module("nlls_gram.linear_solvers").Subproblem
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)
    unravel = ravel_pytree(params)[1]

    def velocity(solver: Any, damping: float, p: Any, x: Any, right: Any) -> Any:
        """The step; ``right`` makes the right-hand side of the residual and its JVP."""
        residual = lambda theta: model(unravel(theta), x)[:, 0] / len(x) ** 0.5
        method = library.LevenbergMarquardt(
            lambda theta: residual(theta), linear_solver=solver, cache_jacobian=False
        )
        theta = ravel_pytree(p)[0]
        _, jvp = jax.linearize(residual, theta)
        transpose = jax.linear_transpose(jvp, theta)
        dense = isinstance(solver, library.Cholesky)
        Jt = method._dense_resid_jt_aux(residual, theta)[1] if dense else None
        zero, same = jnp.float32(0), lambda u: u
        state = method._resolved_state(method.init(theta))
        subproblem = problem(
            resid=right(jvp),
            theta=theta,
            Jt=Jt,
            jvp_fn=jvp,
            JT=lambda u: transpose(u)[0],
            whiten=same,
            whiten_transpose=same,
            y_m=jnp.zeros(0),
            penalty_gradient=jnp.zeros_like(theta),
            ridge=zero,
            damping=jnp.float32(damping),
            n_m=0,
            n_f=len(theta),
            cache=None,
            cache_enabled=False,
            hyper=method.hyperparams(jnp.float32),
            ctx=library.SolverContext(x=theta, lm_state=state, args=None, p=None),
            penalized=False,
        )
        return solver.prepare(subproblem).velocity()

    def dual(p: Any, x: Any, v: Any) -> Any:
        flat = ravel_pytree(v)[0]
        solver = library.Cholesky(form="gram")
        step = velocity(solver, DUAL_DAMPING, p, x, lambda jvp: -jvp(flat))
        return unravel((flat - step) / DUAL_DAMPING)

    def cg(p: Any, x: Any, y: Any) -> Any:
        right = lambda jvp: (model(p, x) - y)[:, 0] / len(x) ** 0.5
        preconditioner = library.IdentityPreconditioner()
        solver = library.CG(preconditioner, tol=0.0, maxiter=ITERATIONS)
        return velocity(solver, DAMPING, p, x, right)

    return {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "ten CG iterations": Program(
            cg,
            lambda: (params, x, y),
            value=lambda result: None,
            note="from its gradient, not from v: not compared",
        ),
        "dual solve": Program(dual, lambda: (params, x, v)),
    }
