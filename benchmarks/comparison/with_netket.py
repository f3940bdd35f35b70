"""The measures with netket: its quantum geometric tensor, on the fly or from dense Jacobians."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from comparison.models import MODELS, data_of, mean_loss
from comparison.program import DAMPING, ITERATIONS, Program, Programs
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """The covariance of the scores, where the output is one number, by products alone."""
    module = importlib.import_module("netket.optimizer.qgt.qgt_onthefly")
    return _programs(work, module.QGTOnTheFly_DefaultConstructor)


def dense(work: Workload) -> Programs:
    """The same from the Jacobian in memory."""
    module = importlib.import_module("netket.optimizer.qgt.qgt_jacobian")
    return _programs(work, functools.partial(module.QGTJacobian_DefaultConstructor, dense=True))


def _programs(work: Workload, construct: Callable[..., Any]) -> Programs:
    reason = "its tensor is the covariance of the scores of one output"
    if work.kind != "regression":
        return {"product": reason}
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)

    def tensor(p: Any, x: Any, diag_shift: float = 0.0) -> Any:
        apply = lambda variables, x: model(variables["params"], x)[:, 0]
        return construct(apply, p, {}, x, diag_shift=diag_shift)

    def cg(p: Any, x: Any, v: Any) -> Any:
        options: Any = {"tol": 0.0, "maxiter": ITERATIONS}
        solve = lambda A, b, x0: jax.scipy.sparse.linalg.cg(A, b, x0=x0, **options)
        return tensor(p, x, DAMPING).solve(solve, v)[0]

    data = lambda: (params, x, v)
    return {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": reason,
        "score product": Program(lambda p, x, v: tensor(p, x) @ v, data),
        "score CG": Program(cg, data),
    }
