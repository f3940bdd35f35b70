"""Exact damped solves behind one name, and the rule that chooses among solvers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.pieces import GaussNewtonPiece
from fvp.factorization import solve_semidefinite
from fvp.numerics import cast_like, tree_axpy, tree_vdot, widen_tree
from fvp.solvers.conjugate_gradient import CGInfo
from fvp.solvers.dual import solve_dual

SOLVERS = ("auto", "cg", "dense", "dual")
_MOST_ROWS = 4096  # a matrix of that size factorises in about the time of a hundred products
_MOST_PARAMETERS = 1024


def choose_solver(operator: CurvatureOperator) -> str:
    """One of "dual", "dense" and "cg", from shapes alone.

    "dual" where examples x outputs are at most 4096 and fewer than the parameters; "dense" where
    the parameters are at most 1024; "cg" otherwise, and for operators that "dual" does not take.
    """
    parameters = sum(math.prod(shape.shape) for shape in operator.template[1])
    if operator.axis_name is not None:
        return "cg"
    if isinstance(operator.piece, GaussNewtonPiece):
        rows = operator.piece.output.size
        if rows <= _MOST_ROWS and rows < parameters:
            return "dual"
    return "dense" if parameters <= _MOST_PARAMETERS else "cg"


def solve_dense(operator: CurvatureOperator, rhs: Any, damping: ArrayLike) -> Any:
    """Solves (F + damping I) x = rhs through the (P, P) matrix."""
    flat, unravel = ravel_pytree(widen_tree(rhs))
    matrix = operator.dense().astype(flat.dtype)
    solution = solve_semidefinite(matrix, jnp.asarray(damping), flat[:, None])[:, 0]
    return cast_like(unravel(solution), rhs)


def solve_exactly(
    solver: str, operator: CurvatureOperator, rhs: Any, damping: Array, targets: Any
) -> tuple[Any, CGInfo]:
    """The solution by "dual" or "dense", and the record of it that CG would give."""
    if solver == "dual":
        x = solve_dual(operator, rhs, damping, targets=targets)
    else:
        x = solve_dense(operator, rhs, damping)
    wide, b = widen_tree(x), widen_tree(rhs)
    product = widen_tree(operator.mv(x))
    residual = tree_axpy(-1, product, tree_axpy(-damping, wide, b))
    curvature, slope = tree_vdot(wide, product), tree_vdot(wide, b)
    norm = jnp.sqrt(tree_vdot(residual, residual))
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(x):
        finite &= jnp.all(jnp.isfinite(leaf))
    info = CGInfo(
        iterations=jnp.zeros((), jnp.int32),
        residual_norm=norm,
        converged=finite,
        breakdown=~finite,
        model_value=0.5 * (curvature + damping * tree_vdot(wide, wide)) - slope,
        curvature=curvature,
    )
    return x, info
