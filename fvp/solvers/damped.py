"""Damped systems (F + Lambda) x = b: what is solved, and the bases of what solves it.

A solver prepares a system for one curvature and one damping, and keeps what it likes between steps;
the system solves for right-hand sides. Both are for the transformations: `fvp.cg` and
`fvp.solve_dual` are the same methods as functions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.curvature import CurvatureOperator, Problem
from fvp.numerics import (
    computed_once,
    tree_axpy,
    tree_is_finite,
    tree_vdot,
    wide_dtype,
    widen,
    widen_tree,
)
from fvp.records import Record
from fvp.solvers.cg_iteration import CGInfo
from fvp.typing import Batch, Params, PyTree


@dataclasses.dataclass(frozen=True)
class DampedCurvature(Record):
    """F + damping D + l2 I.

    Attributes:
      operator: F.
      damping: a number or scalar array.
      diagonal: D, a tree of positive entries of mean 1 like the parameters; None is the identity.
      l2: of the penalty l2/2 |params|^2 in the loss; None is none.
    """

    operator: CurvatureOperator
    damping: ArrayLike
    diagonal: PyTree = None
    l2: ArrayLike | None = None

    def damp(self, v: Params) -> Params:
        """Damping D v, in float32 or wider."""
        damping = computed_once(jnp.asarray(self.damping))
        scaled = jax.tree.map(lambda x: damping.astype(wide_dtype(x.dtype)) * widen(x), v)
        if self.diagonal is None:
            return scaled
        return jax.tree.map(lambda x, d: x * d.astype(x.dtype), scaled, self.diagonal)

    def damp_all(self, v: Params) -> Params:
        """(damping D + l2 I) v, in float32 or wider."""
        return self.damp(v) if self.l2 is None else tree_axpy(self.l2, v, self.damp(v))

    def mv(self, v: Params) -> Params:
        """The whole matrix times ``v``, in float32 or wider."""
        return tree_axpy(1, self.damp_all(v), widen_tree(self.operator.mv(v)))

    def record(self, x: Params, rhs: Params, product: Params | None = None) -> CGInfo:
        """The record of a direct solve; the curvature is that of F.

        ``product`` is F x, where it is known.
        """
        wide, b = widen_tree(x), widen_tree(rhs)
        product = widen_tree(self.operator.mv(x) if product is None else product)
        damped = self.damp_all(x)
        residual = tree_axpy(-1, product, tree_axpy(-1, damped, b))
        curvature, slope = tree_vdot(wide, product), tree_vdot(wide, b)
        finite = tree_is_finite(x)
        return CGInfo(
            iterations=jnp.zeros((), jnp.int32),
            residual_norm=jnp.sqrt(tree_vdot(residual, residual)),
            converged=finite,
            breakdown=~finite,
            model_value=0.5 * (curvature + tree_vdot(wide, damped)) - slope,
            curvature=curvature,
            damping_term=tree_vdot(wide, self.damp(x)),
        )


class DampedSystem(abc.ABC):
    """(F + Lambda), ready to solve; lives inside one step.

    Attributes:
      damped: what is solved; its damping may be above the one that was asked for.
    """

    #: Whether it solves to rounding: then it may have been asked to without damping.
    direct: ClassVar[bool] = False

    damped: DampedCurvature

    @abc.abstractmethod
    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """The x in the dtypes of ``rhs``, and the record of the solve.

        ``start`` is a guess that an iteration may begin with. ``self.damped.record(x, rhs)`` is
        the record of a direct solve.
        """

    def solve_outputs(self, u: Array) -> Params:
        """(F + Lambda)^-1 J^T H u for a change ``u`` of the outputs."""
        return self.solve(self.damped.operator.transpose_product(u), None)[0]


class Setting(NamedTuple):
    """What a solver may know before the first step.

    Attributes:
      params: the parameters, or their shapes.
      adaptive: whether the damping adapts, and steps are tried.
      problem: ``problem(params, batch)`` is the loss at a batch.
    """

    params: Params
    adaptive: bool
    problem: Callable[[Params, Batch], Problem]


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a solver may read at a step, beside the curvature.

    Attributes:
      count: int32, number of the step.
      norm: norm of the gradient.
      targets: the labels whose gradient the right-hand side is, or None.
      failed: bool, the last step was not accepted; True before the first.
    """

    count: Array
    norm: Array
    targets: Any
    failed: Array


class Verdict(NamedTuple):
    """How a step went; bools.

    Attributes:
      sound: the solve descended, or failed on a gradient that was sound.
      informative: the step says something about damping and solver.
      good: it was accepted, the solve stopped before it had converged, and gradients still agree.
      noisy: the noise of the batches leads.
    """

    sound: Array
    informative: Array
    good: Array
    noisy: Array


class DampedSolver(abc.ABC):
    """Solves (F + damping D + l2 I) d = g at every step: the base of solvers, and of your own.

    A frozen dataclass of options, passed as ``solver=``. What it keeps between steps is a pytree
    of arrays of fixed shapes.

    Examples:
      >>> import dataclasses, jax, jax.numpy as jnp, fvp
      >>> from jax.flatten_util import ravel_pytree
      >>> @dataclasses.dataclass(frozen=True)
      ... class LeastSquares(fvp.DampedSystem):
      ...     damped: fvp.DampedCurvature
      ...     def solve(self, rhs, start):
      ...         b, unravel = ravel_pytree(rhs)
      ...         matrix = self.damped.operator.dense() + self.damped.damping * jnp.eye(b.size)
      ...         x = unravel(jnp.linalg.lstsq(matrix, b)[0])
      ...         return x, self.damped.record(x, rhs)
      >>> class LeastSquaresSolver(fvp.DampedSolver):
      ...     def prepare(self, damped, moment, state):
      ...         return LeastSquares(damped), state
      >>> model = lambda w, x: x @ w
      >>> x, y, w = jnp.eye(2), jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1))
      >>> tx = fvp.scale_by_fisher(model, fvp.Gaussian(), damping=0.0, solver=LeastSquaresSolver())
      >>> grad = jax.grad(lambda w: fvp.Gaussian().nll(model(w, x), y).mean())(w)
      >>> print((w - tx.update(grad, tx.init(w), w, batch=x)[0]).round(3))
      [[1.]
       [2.]]
    """

    #: Whether it solves with a diagonal D other than the identity.
    takes_diagonal: ClassVar[bool] = False
    #: Whether its solutions are directions only, whose length the exact curvature then chooses.
    approximate: ClassVar[bool] = False
    #: Whether its systems solve to rounding, so that they may be asked to without damping.
    direct: ClassVar[bool] = False
    #: Whether it starts from 0.95 times the last solution where there is no momentum.
    warm_start: bool = False

    def without_damping(self) -> DampedSolver:
        """The solver to take where steps may go without damping: itself, unless it has a choice."""
        return self

    def init(self, setting: Setting) -> PyTree:
        """What is kept between steps, before the first."""
        del setting
        return None

    @abc.abstractmethod
    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: PyTree
    ) -> tuple[DampedSystem, PyTree]:
        """The system of one step, and what is kept."""

    def correct(self, before: PyTree, prepared: PyTree, verdict: Verdict) -> PyTree:
        """What is kept after the step: from ``before`` it, and as `prepare` left it."""
        del before, verdict
        return prepared
