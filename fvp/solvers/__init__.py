"""Solvers of (A + damping I) x = rhs for operators and callables."""

from fvp.solvers.conjugate_gradient import CGInfo, cg
from fvp.solvers.dual import solve_dual
from fvp.solvers.systems import SOLVERS, CGSystem, ExactSystem, choose_solver

__all__ = ["SOLVERS", "CGInfo", "CGSystem", "ExactSystem", "cg", "choose_solver", "solve_dual"]
