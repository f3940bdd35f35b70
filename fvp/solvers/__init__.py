"""Solvers of (A + damping I) x = rhs for operators and callables."""

from fvp.solvers.conjugate_gradient import CGInfo, cg

__all__ = ["CGInfo", "cg"]
