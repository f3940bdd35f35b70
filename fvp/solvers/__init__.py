"""Solvers of (A + damping I) x = rhs for operators and callables."""

from fvp.solvers.conjugate_gradient import CGInfo, cg
from fvp.solvers.direct import SOLVERS, choose_solver, solve_exactly
from fvp.solvers.dual import solve_dual

__all__ = ["SOLVERS", "CGInfo", "cg", "choose_solver", "solve_dual", "solve_exactly"]
