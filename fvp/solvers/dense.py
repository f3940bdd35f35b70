"""Exact damped solves with the (P, P) matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fvp.factorization import SemidefiniteFactor
from fvp.numerics import (
    cast_like,
    tree_axpy,
    tree_vdot,
    tree_where,
    tree_zeros_like,
    wide_dtype,
    widen_tree,
)
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSolver, DampedSystem, Moment
from fvp.typing import Params, PyTree

# Least damping of an exact solve over the norm of the gradient: below, where the curvature vanishes
# in float32, the squared norm of the solution would overflow; docs/decisions/solvers.md
_LEAST = 2.0**-60
# Least damping with targets, over eps trace(F): a factorisation's own rounding.
ROUNDING = 8.0  # docs/decisions/solvers.md
_REFINEMENTS = 3  # each takes the rounding back to a hundredth; docs/decisions/solvers.md


@dataclasses.dataclass(frozen=True)
class Dense(DampedSolver):
    """F + damping I as a matrix, factorised: for small models.

    Damping and l2 are at least sqrt(eps) trace(F): below that a right-hand side's rounding outside
    the range of F would be blown up. With targets, in float32 or wider, it is taken back, by steps
    of refinement whose residual is that of the outputs, and only 8 eps trace(F) is needed, the
    rounding of the factorisation itself.
    """

    direct: ClassVar[bool] = True

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: PyTree
    ) -> tuple[DampedSystem, PyTree]:
        """Makes and factorises the matrix."""
        matrix = damped.operator.dense()
        matrix = matrix.astype(wide_dtype(matrix.dtype))
        eps, targets = float(jnp.finfo(matrix.dtype).eps), moment.targets
        leaves = jax.tree.leaves(damped.operator.like)
        narrow = any(leaf.dtype != wide_dtype(leaf.dtype) for leaf in leaves)
        if narrow or damped.operator.linearized.jacobian is None:
            targets = None
        level = eps**0.5 if targets is None else ROUNDING * eps
        damped, total = above_rounding(damped, matrix, level, moment.norm)
        return DenseSystem(damped, SemidefiniteFactor.of(matrix, total), total, targets), state


@dataclasses.dataclass(frozen=True)
class DenseSystem(DampedSystem):
    """The factorised matrix."""

    direct: ClassVar[bool] = True

    damped: DampedCurvature
    factor: SemidefiniteFactor
    total: Array  # damping and l2
    targets: Any

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """By the factor; ``start`` is not needed."""
        del start
        x = self._by_factor(widen_tree(rhs))
        if self.targets is not None:
            more = self._beside_gradient(rhs)
            refine = lambda _, x: tree_axpy(1, self._by_factor(self._residual(x, more)), x)
            x = jax.lax.fori_loop(0, _REFINEMENTS, refine, x)
        x = cast_like(x, rhs)
        return x, self.damped.record(x, rhs)

    def _by_factor(self, rhs: Params) -> Params:
        flat, unravel = ravel_pytree(rhs)
        return unravel(self.factor.solve(flat[:, None])[:, 0])

    def _beside_gradient(self, rhs: Params) -> Params:
        """``rhs`` less the gradient at the targets."""
        wide = widen_tree(rhs)
        return above_noise(tree_axpy(-1, self._gradient_after(tree_zeros_like(wide)), wide), wide)

    def _residual(self, x: Params, more: Params) -> Params:
        """What ``x`` leaves of the gradient at the targets and ``more``."""
        left = self._gradient_after(jax.tree.map(jnp.negative, x))
        return tree_axpy(1, more, tree_axpy(-self.total, x, left))

    def _gradient_after(self, v: Params) -> Params:
        operator = self.damped.operator
        return widen_tree(operator.gradient_after(cast_like(v, operator.like), self.targets))


def above_noise(rest: Params, whole: Params) -> Params:
    """``rest`` of a difference, or zeros where it is the rounding of the ``whole``."""
    level = 64 * jnp.finfo(jnp.result_type(*jax.tree.leaves(whole))).eps
    noise = tree_vdot(rest, rest) <= level**2 * tree_vdot(whole, whole)
    return tree_where(noise, tree_zeros_like(rest), rest)


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
