"""Approximate inverses of a damped curvature, pytree to pytree: the ``M=`` of `fvp.cg`."""

from fvp.preconditioners.base import Preconditioner
from fvp.preconditioners.diagonal import (
    DiagonalPreconditioner,
    Jacobi,
    diagonal_preconditioner,
)
from fvp.preconditioners.nystrom import NystromPreconditioner, nystrom_preconditioner

__all__ = [
    "DiagonalPreconditioner",
    "Jacobi",
    "NystromPreconditioner",
    "Preconditioner",
    "diagonal_preconditioner",
    "nystrom_preconditioner",
]
