"""The choice among solvers that shapes alone can make."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax

from fvp.curvature import CurvatureOperator
from fvp.mesh import row_axes
from fvp.solvers.damped import (
    DampedCurvature,
    DampedSolver,
    DampedSystem,
    Moment,
    Setting,
    Verdict,
)
from fvp.solvers.dense import Dense
from fvp.solvers.dual import Dual, no_dual
from fvp.solvers.iterative import CG, CGState
from fvp.typing import PyTree

# docs/decisions/solvers.md
_MOST_ROWS = 4096
_MOST_PARAMETERS = 1024
_MOST_EXACT = 8192
_WIDEST = 16


@dataclasses.dataclass(frozen=True)
class Auto(DampedSolver):
    """`fvp.Dual`, `fvp.Dense` or conjugate gradients, by shapes.

    "dual" where examples x outputs are at most 4096 and fewer than the parameters; "dense" where
    the parameters are at most 1024; else ``cg``, which operators that "dual" does not take and
    examples sharded over Explicit mesh axes get as well.

    Args:
      cg: the solver where neither matrix is small.
      exact: for steps that may go without damping, which ``cg`` can't take: both limits are 8192,
        and the Jacobian is factorised by QR where its square loses digits, unless a "dual" one has
        more than 16 parameters for each row, and QR would be most of the step.
    """

    direct: ClassVar[bool] = True
    takes_diagonal: ClassVar[bool] = True

    cg: CG = dataclasses.field(default_factory=CG)
    exact: bool = False

    @property
    def warm_start(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of conjugate gradients."""
        return self.cg.warm_start

    def without_damping(self) -> Auto:
        """With a matrix as long as it fits into memory."""
        return dataclasses.replace(self, exact=True)

    def init(self, setting: Setting) -> CGState:
        """The state of conjugate gradients: which solver it is depends on the batch."""
        return self.cg.init(setting)

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: CGState
    ) -> tuple[DampedSystem, CGState]:
        """The system of the solver chosen."""
        solver = self.chosen(damped.operator)
        if not solver.takes_diagonal:
            damped = dataclasses.replace(damped, diagonal=None)
        return solver.prepare(damped, moment, state)

    def correct(self, before: CGState, prepared: CGState, verdict: Verdict) -> PyTree:
        """As conjugate gradients do."""
        return self.cg.correct(before, prepared, verdict)

    def chosen(self, operator: CurvatureOperator) -> DampedSolver:
        """The solver for these shapes."""
        if operator.axis_name is not None:
            return self.cg
        most_rows = _MOST_EXACT if self.exact else _MOST_ROWS
        most_parameters = _MOST_EXACT if self.exact else _MOST_PARAMETERS
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(operator.like))
        if operator.problem is not None:
            if row_axes(operator.linearized.output) is not None:
                return self.cg
            rows = operator.linearized.output.size
            if rows <= most_rows and rows < parameters and no_dual(operator) is None:
                return Dual(qr=self.exact and parameters <= _WIDEST * rows)
        return Dense(qr=self.exact) if parameters <= most_parameters else self.cg
