"""Solvers of (A + damping I) x = rhs: as functions, and as options of the transformations."""

from fvp.solvers.auto import Auto
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.conjugate_gradient import cg
from fvp.solvers.damped import (
    DampedCurvature,
    DampedSolver,
    DampedSystem,
    Moment,
    Setting,
    Verdict,
)
from fvp.solvers.dense import Dense
from fvp.solvers.dual import Dual, solve_dual
from fvp.solvers.factored import KFACSolver, KFACState
from fvp.solvers.iterative import CG

__all__ = [
    "CG",
    "Auto",
    "CGInfo",
    "DampedCurvature",
    "DampedSolver",
    "DampedSystem",
    "Dense",
    "Dual",
    "KFACSolver",
    "KFACState",
    "Moment",
    "Setting",
    "Verdict",
    "cg",
    "solve_dual",
]
