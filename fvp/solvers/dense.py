"""Exact damped solves with the (P, P) matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.factorization import SemidefiniteFactor
from fvp.layers.dense import MOST_ENTRIES, WhitenedRows
from fvp.numerics import (
    cast_like,
    tree_axpy,
    tree_zeros_like,
    wide_dtype,
    widen_tree,
)
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSolver, DampedSystem, Moment
from fvp.solvers.orthogonal import orthogonal_system
from fvp.solvers.rounding import REFINEMENTS, ROUNDING, above_noise, above_rounding, holds_digits
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Dense(DampedSolver):
    """F + damping I as a matrix, factorised: for small models.

    Damping and l2 are at least sqrt(eps) trace(F): below that a right-hand side's rounding outside
    the range of F would be blown up. With targets, in float32 or wider, it is taken back, by steps
    of refinement whose residual is that of the outputs, and only 8 eps trace(F) is needed, the
    rounding of the factorisation itself.

    Args:
      qr: whether less damping than that is solved for by the QR factorisation of A, F = A^T A, at
        two to three times the cost, down to 64 eps^2 trace(F): F itself has lost every eigenvalue
        below eps of the largest, A those below eps^2. With targets, in float32 or wider, and where
        A, examples x outputs by parameters, has at most 2^27 entries; examples of negative weight
        are left out of A. Steps that may go without damping have it.
    """

    direct: ClassVar[bool] = True

    qr: bool = False

    def without_damping(self) -> Dense:
        """By QR."""
        return dataclasses.replace(self, qr=True)

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: PyTree
    ) -> tuple[DampedSystem, PyTree]:
        """Makes and factorises the matrix."""
        targets = moment.targets if holds_digits(damped.operator) else None
        if self.qr and (system := _of_root(damped, targets, moment.norm)) is not None:
            return system, state
        if damped.operator.linearized.jacobian is None:
            targets = None
        matrix = damped.operator.dense()
        matrix = matrix.astype(wide_dtype(matrix.dtype))
        eps = float(jnp.finfo(matrix.dtype).eps)
        level = eps**0.5 if targets is None else ROUNDING * eps
        damped, total = above_rounding(damped, level * jnp.trace(matrix), moment.norm)
        return DenseSystem(damped, SemidefiniteFactor.of(matrix, total), total, targets), state


def _of_root(damped: DampedCurvature, targets: Any, norm: Array) -> DampedSystem | None:
    """By A, F = A^T A; None where it is not to be had, or too large, or tells no gradient."""
    rows = WhitenedRows.of(damped.operator)
    w = None if rows is None else rows.coefficients(targets)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(damped.operator.like))
    if rows is None or w is None or w.size * parameters > MOST_ENTRIES:
        return None
    return orthogonal_system(damped, rows, w, norm)


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
            x = jax.lax.fori_loop(0, REFINEMENTS, refine, x)
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
