"""Conjugate gradients as the solver of the transformations."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_nonnegative, check_positive_int
from fvp.numerics import cast_like, tree_axpy, tree_is_finite, tree_vdot, tree_where
from fvp.preconditioners.base import Preconditioner
from fvp.solvers.budget import ITERATIONS, Budget
from fvp.solvers.cg_iteration import CGInfo, LinearSystem, solve
from fvp.solvers.conjugate_gradient import iteration_limit
from fvp.solvers.damped import (
    DampedCurvature,
    DampedSolver,
    DampedSystem,
    Moment,
    Setting,
    Verdict,
)
from fvp.typing import Params, PyTree


class CGState(NamedTuple):
    """What `CG` keeps between steps."""

    budget: Any  # Budget of iterations where it adapts; or None
    preconditioner: Any  # what the preconditioner made last; or None


@dataclasses.dataclass(frozen=True)
class CG(DampedSolver):
    """Conjugate gradients, matrix-free.

    Args:
      maxiter: most iterations. None is 11; with adaptive damping, up to ten times as many while
        steps make little progress, gradients agree and CG ends at the limit.
      tol: stops at this relative residual.
      warm_start: start at 0.95 times the last solution; costs one product.
      preconditioner: a `fvp.Preconditioner`, such as `fvp.Jacobi`; None is none.
      refresh_period: steps between two updates of the preconditioner; after a rejected step it is
        updated at once.

    Examples:
      >>> import fvp
      >>> solver = fvp.CG(maxiter=20, preconditioner=fvp.Jacobi(), refresh_period=10)
      >>> tx = fvp.natural_gradient(1.0, lambda w, x: x @ w, fvp.Gaussian(), solver=solver)
    """

    takes_diagonal: ClassVar[bool] = True

    maxiter: Any = None
    tol: ArrayLike = 0.01
    warm_start: bool = False
    preconditioner: Preconditioner | None = None
    refresh_period: int = 1

    def __post_init__(self) -> None:
        check_nonnegative(self.tol, "tol")
        check_positive_int(self.refresh_period, "refresh_period")
        if self.maxiter is not None:
            check_nonnegative(self.maxiter, "maxiter")
        if not (self.preconditioner is None or isinstance(self.preconditioner, Preconditioner)):
            raise TypeError(
                "preconditioner: expected a fvp.Preconditioner such as fvp.Jacobi(), got"
                f" {self.preconditioner!r}; fvp.cg takes any callable as M=."
            )

    def init(self, setting: Setting) -> CGState:
        """The first budget, and the preconditioner's own state."""
        budget = Budget.first() if setting.adaptive and self.maxiter is None else None
        preconditioner = self.preconditioner
        return CGState(budget, preconditioner and preconditioner.init(setting.params))

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: CGState
    ) -> tuple[DampedSystem, CGState]:
        """Refreshes what is due."""
        maxiter, budget = ITERATIONS if self.maxiter is None else self.maxiter, state.budget
        if budget is not None:
            budget = budget.observe(moment.norm)
            maxiter = budget.iterations
        made = state.preconditioner
        if self.preconditioner is not None:
            made = self._refreshed(damped, moment, made)
        inverse = None
        if (preconditioner := self.preconditioner) is not None:
            inverse = lambda v: preconditioner.apply(made, v)
        system = CGSystem(damped, inverse, self.tol, maxiter)
        return system, CGState(budget, made)

    def correct(self, before: CGState, prepared: CGState, verdict: Verdict) -> CGState:
        """Follows progress with the budget; a bad batch leaves it alone."""
        if prepared.budget is None:
            return prepared
        resized = prepared.budget.correct(short=verdict.good, noisy=verdict.noisy)
        seen = tree_where(verdict.sound, prepared.budget, before.budget)
        budget = tree_where(verdict.informative, resized, seen)
        return prepared._replace(budget=budget)

    def _refreshed(self, damped: DampedCurvature, moment: Moment, made: PyTree) -> PyTree:
        assert self.preconditioner is not None
        preconditioner = self.preconditioner
        damping = damped.damping if damped.l2 is None else damped.damping + damped.l2

        def new() -> PyTree:
            fresh = preconditioner.update(made, damped.operator, damping)
            # One bad batch would stay until the next refresh.
            return tree_where(tree_is_finite(fresh), fresh, made)

        if self.refresh_period == 1:
            return new()
        due = (moment.count % self.refresh_period == 0) | moment.failed
        return jax.lax.cond(due, new, lambda: made)


@dataclasses.dataclass(frozen=True)
class CGSystem(DampedSystem):
    """F + damping D + l2 I."""

    damped: DampedCurvature
    inverse: Any  # v -> an approximation of (F + damping D + l2 I)^-1 v; or None
    tol: ArrayLike
    maxiter: Any

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """From ``start``; zeros where that is None."""
        damped, l2 = self.damped, self.damped.l2
        limit, _ = iteration_limit(rhs, self.maxiter)
        system = LinearSystem(
            damped.operator if l2 is None else _Shifted(damped),
            damped.damping,
            damped.diagonal,
            M=None if self.inverse is None else self._in_root_space,
            tol=self.tol,
            limit=limit,
        )
        x, info = solve(system, rhs, start)
        if l2 is not None:
            info = info._replace(curvature=info.curvature - l2 * tree_vdot(x, x))
        return x, info

    def _in_root_space(self, r: Params) -> Params:
        """D^(1/2) M D^(1/2): what approximates the inverse of the system that CG iterates in."""
        if self.damped.diagonal is None:
            return cast_like(self.inverse(r), r)
        root = jax.tree.map(jnp.sqrt, self.damped.diagonal)
        times = lambda v: jax.tree.map(
            lambda x, d: (x * d.astype(x.dtype)).astype(x.dtype), v, root
        )
        return times(cast_like(self.inverse(times(r)), r))


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """F + l2 I."""

    damped: DampedCurvature

    def mv_and_form(self, v: Params) -> tuple[Params, Array]:
        """The product with ``v``, and its inner product with ``v``."""
        product, form = self.damped.operator.mv_and_form(v)
        l2: Any = self.damped.l2
        return tree_axpy(l2, v, product), form + l2 * tree_vdot(v, v)
