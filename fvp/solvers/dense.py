"""Exact damped solves with the (P, P) matrix."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.factorization import SemidefiniteFactor
from fvp.numerics import cast_like, wide_dtype, widen_tree
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSolver, DampedSystem, Moment
from fvp.typing import Params, PyTree

# Least damping of an exact solve over the norm of the gradient: below, where the curvature vanishes
# in float32, the squared norm of the solution would overflow; docs/decisions/solvers.md
_LEAST = 2.0**-60


@dataclasses.dataclass(frozen=True)
class Dense(DampedSolver):
    """F + damping I as a matrix, factorised: for small models.

    Damping and l2 are at least sqrt(eps) trace(F): below that a right-hand side's rounding outside
    the range of F would be blown up.
    """

    direct: ClassVar[bool] = True

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: PyTree
    ) -> tuple[DampedSystem, PyTree]:
        """Makes and factorises the matrix."""
        matrix = damped.operator.dense()
        matrix = matrix.astype(wide_dtype(matrix.dtype))
        level = float(jnp.finfo(matrix.dtype).eps) ** 0.5
        damped, total = above_rounding(damped, matrix, level, moment.norm)
        return DenseSystem(damped, SemidefiniteFactor.of(matrix, total)), state


@dataclasses.dataclass(frozen=True)
class DenseSystem(DampedSystem):
    """The factorised matrix."""

    direct: ClassVar[bool] = True

    damped: DampedCurvature
    factor: SemidefiniteFactor

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """By the factor; ``start`` is not needed."""
        del start
        flat, unravel = ravel_pytree(widen_tree(rhs))
        x = cast_like(unravel(self.factor.solve(flat[:, None])[:, 0]), rhs)
        return x, self.damped.record(x, rhs)


def above_rounding(
    damped: DampedCurvature, matrix: Array, level: ArrayLike, norm: Array
) -> tuple[DampedCurvature, Array]:
    """The same with as much damping as rounding wants, and damping + l2.

    At least ``level`` trace(F) for the ``matrix`` that has its trace, and a part of the ``norm`` of
    the gradient, also where F vanishes.
    """
    shift = 0.0 if damped.l2 is None else damped.l2
    total = jnp.asarray(damped.damping + shift, matrix.dtype)
    total = jnp.maximum(total, level * jnp.trace(matrix))
    total = jnp.maximum(total, jnp.asarray(norm * _LEAST, matrix.dtype))
    return dataclasses.replace(damped, damping=total - shift), total
