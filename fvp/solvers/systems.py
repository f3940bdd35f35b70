"""Damped systems (F + Lambda) x = b behind one interface, and the rule that chooses among solvers.

A system is set up once for one operator and one damping. ``solve(rhs, start, targets)`` gives x and
the record of the solve; ``solve_outputs(u)`` gives (F + Lambda)^-1 J^T H_L u for a change u of the
outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.pieces import GaussNewtonPiece
from fvp.factorization import SemidefiniteFactor
from fvp.layers.columns import has_root
from fvp.mesh import row_axes
from fvp.numerics import cast_like, tree_axpy, tree_is_finite, tree_vdot, wide_dtype, widen_tree
from fvp.solvers.conjugate_gradient import CGInfo, iteration_limit, solve_in_metric
from fvp.solvers.dual import DualSystem, ExampleRows

SOLVERS = ("auto", "cg", "dense", "dual")
_MOST_ROWS = 4096  # a matrix of that size factorises in about the time of a hundred products
_MOST_PARAMETERS = 1024


def choose_solver(operator: CurvatureOperator) -> str:
    """One of "dual", "dense" and "cg", from shapes alone.

    "dual" where examples x outputs are at most 4096 and fewer than the parameters; "dense" where
    the parameters are at most 1024; "cg" otherwise, for operators that "dual" does not take, and
    for examples sharded over Explicit mesh axes.
    """
    parameters = sum(math.prod(shape.shape) for shape in operator.template[1])
    if operator.axis_name is not None:
        return "cg"
    if isinstance(operator.piece, GaussNewtonPiece):
        rows, sharded = operator.piece.output.size, row_axes(operator.piece.output)
        if sharded is not None:
            return "cg"
        exact = has_root(operator.piece.metric)
        if exact and rows <= _MOST_ROWS and rows < parameters:
            return "dual"
    return "dense" if parameters <= _MOST_PARAMETERS else "cg"


@dataclasses.dataclass(frozen=True)
class CGSystem:
    """F + damping D + shift I, solved by conjugate gradients; D = I where ``metric`` is None."""

    operator: CurvatureOperator
    damping: ArrayLike
    shift: Any  # None for none
    metric: Any  # pytree of positive entries
    tol: ArrayLike
    maxiter: Any

    def solve(self, rhs: Any, start: Any, targets: Any) -> tuple[Any, CGInfo]:
        """The x and its record, from ``start``; the curvature in it is that of F."""
        del targets
        operator = self.operator if self.shift is None else _Shifted(self.operator, self.shift)
        limit, window = iteration_limit(rhs, self.maxiter)
        del window
        x, info = solve_in_metric(
            operator, None, self.metric, rhs, self.damping, start, self.tol, 0.0, limit, 0, 0.0
        )
        if self.shift is not None:
            info = info._replace(curvature=info.curvature - self.shift * tree_vdot(x, x))
        return x, info

    def solve_outputs(self, u: Array) -> Any:
        """(F + Lambda)^-1 J^T H_L u."""
        return self.solve(self.operator.pull(u), None, None)[0]


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """F + shift I."""

    operator: CurvatureOperator
    shift: Any

    def mv_and_form(self, v: Any) -> tuple[Any, Array]:
        """The product with ``v``, and its inner product with ``v``."""
        product, form = self.operator.mv_and_form(v)
        return tree_axpy(self.shift, v, product), form + self.shift * tree_vdot(v, v)


@dataclasses.dataclass(frozen=True)
class DenseSystem:
    """F + damping I as a (P, P) matrix."""

    operator: CurvatureOperator
    factor: SemidefiniteFactor

    def solve(self, rhs: Any, targets: Any) -> Any:
        """The x."""
        del targets
        flat, unravel = ravel_pytree(widen_tree(rhs))
        return cast_like(unravel(self.factor.solve(flat[:, None])[:, 0]), rhs)

    def solve_outputs(self, u: Array) -> Any:
        """(F + damping I)^-1 J^T H_L u."""
        return self.solve(self.operator.pull(u), None)


@dataclasses.dataclass(frozen=True)
class ExactSystem:
    """F + damping I + shift I, factorised."""

    operator: CurvatureOperator
    damping: Array
    shift: ArrayLike
    factorised: DualSystem | DenseSystem

    @classmethod
    def of(
        cls,
        solver: str,
        operator: CurvatureOperator,
        damping: ArrayLike,
        shift: ArrayLike,
        targets: Any,
        least: ArrayLike = 0.0,
    ) -> ExactSystem:
        """``solver`` is "dual" or "dense".

        Damping and shift are at least sqrt(eps) trace(F): below that a right-hand side's rounding
        outside the range of F would be blown up. A dual system that knows the ``targets`` has none,
        and needs only the bound of a numerical rank, eps n trace(F) for n rows. Both are at least
        ``least``, also where F vanishes.
        """
        if solver == "dual":
            rows = ExampleRows.of(operator)
            matrix = rows.gram()
            whitened = targets is not None and rows.whitened(targets) is not None
        else:
            rows, matrix, whitened = None, operator.dense(), False
        matrix = matrix.astype(wide_dtype(matrix.dtype))
        eps = float(jnp.finfo(matrix.dtype).eps)
        level = eps * len(matrix) if whitened else eps**0.5
        total = jnp.asarray(damping + shift, matrix.dtype)
        total = jnp.maximum(total, level * jnp.trace(matrix))
        total = jnp.maximum(total, jnp.asarray(least, matrix.dtype))
        if rows is not None:
            factorised = DualSystem.of(rows, matrix, total)
        else:
            factorised = DenseSystem(operator, SemidefiniteFactor.of(matrix, total))
        return cls(operator, total - shift, shift, factorised)

    def solve(self, rhs: Any, start: Any, targets: Any) -> tuple[Any, CGInfo]:
        """The x, and the record of it that CG would give; ``start`` is not needed."""
        del start
        x = self.factorised.solve(rhs, targets)
        wide, b = widen_tree(x), widen_tree(rhs)
        product = widen_tree(self.operator.mv(x))
        total = self.damping + self.shift
        residual = tree_axpy(-1, product, tree_axpy(-total, wide, b))
        curvature, slope, xx = (tree_vdot(wide, v) for v in (product, b, wide))
        finite = tree_is_finite(x)
        info = CGInfo(
            iterations=jnp.zeros((), jnp.int32),
            residual_norm=jnp.sqrt(tree_vdot(residual, residual)),
            converged=finite,
            breakdown=~finite,
            model_value=0.5 * (curvature + total * xx) - slope,
            curvature=curvature,
            damping_term=self.damping * xx,
        )
        return x, info

    def solve_outputs(self, u: Array) -> Any:
        """(F + damping I)^-1 J^T H_L u."""
        return self.factorised.solve_outputs(u)
