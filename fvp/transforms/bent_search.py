"""A line search whose steps bend with the model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.line_search import halving_search
from fvp.numerics import (
    cast_like,
    tree_axpy,
    tree_norm,
    tree_scale,
    tree_where,
    tree_zeros_like,
)
from fvp.solvers import DampedSystem
from fvp.transforms.geodesic import LONGEST, problem_of
from fvp.transforms.objective import Objective
from fvp.typing import Params

# Where these numbers come from: docs/decisions/steps.md
_CORRECTIONS = 8  # of one length at most, where each is one more solve with factors that are there


class _Trial(NamedTuple):
    """The corrections of one length so far."""

    step: Params  # with all of them
    output: Array  # z after it
    best: Params  # of the steps so far
    loss: Array  # after the best
    evaluations: Array  # how many
    going: Array  # bool: whether one more correction may lower the loss


@dataclasses.dataclass(frozen=True)
class BentSearch:
    """By `halving_search`, of steps s d + c_1 + c_2 + ... of lengths s.

    The outputs should move by -s J d, but they bend away. Each c_k is the damped solution for what
    they are off, (F + Lambda)^-1 J^T H_L (z - (z_0 - s J d)): one evaluation of the model, and one
    solve with the factors that are there. c_1 is geodesic acceleration, up to third order; with
    those after it a step keeps to a curved valley in which a straight one could only be short.
    They end where the loss falls no more, and a length whose c_1 is longer than 3/4 of s d is too
    long: the model is another one there.

    Reference:
      J. Fan, The modified Levenberg-Marquardt method for nonlinear equations with cubic
      convergence, 2012; M. Transtrum, J. Sethna, Improvements to the Levenberg-Marquardt algorithm
      for nonlinear least-squares minimization, 2012.
    """

    objective: Objective
    system: DampedSystem
    direction: Params  # d, to be subtracted
    length: Array  # the whole one, a multiple of d
    after: Callable[[Params], Params]  # the parameters after a step
    allowed: Callable[[Array], Any]  # whether outputs are within the bound on the divergence

    def __call__(self) -> tuple[Array, Array, Params]:
        """The part of the whole length, the loss and the step, as `halving_search` has them."""
        problem, d = problem_of(self.system), self.direction
        tangent = cast_like(d, problem.params)
        if (jacobian := self.system.damped.operator.linearized.jacobian) is not None:
            change = jacobian.jvp(tangent)
        else:
            _, change = jax.jvp(problem.outputs, (problem.params,), (tangent,))
        before = self.objective.loss_before()
        tried = lambda part: self._tried(part * self.length, change, before.dtype)
        return halving_search(tried, before, tree_zeros_like(d))

    def _tried(self, length: Array, change: Array, dtype: Any) -> tuple[Array, Params]:
        """The loss and the step of one length; an infinite loss where it is too long."""
        output = self.objective.operator.linearized.output
        straight = tree_scale(length, self.direction)
        wanted = output - length.astype(output.dtype) * change
        most = LONGEST * tree_norm(straight)
        corrections = _CORRECTIONS if self.system.direct else 1

        def correction(trial: _Trial) -> Params:
            off = (trial.output - wanted).astype(output.dtype)
            return cast_like(self.system.solve_outputs(off), straight)

        def corrected(trial: _Trial) -> _Trial:
            first = trial.evaluations == 0
            more = jax.lax.cond(first, lambda _: tree_zeros_like(straight), correction, trial)
            far = (trial.evaluations == 1) & ~(tree_norm(more) <= most)
            step = tree_axpy(1, more, trial.step)
            params = self.after(step)
            # Of the operator's batch, whose rows of no weight are finite; the loss has its own.
            z = problem_of(self.system).outputs(params)
            loss = self.objective.loss(params).astype(dtype)
            # The straight step is not one of them: where it is lower, the valley is left.
            sound = ~first & ~far & jnp.isfinite(loss) & self.allowed(z)
            lower = sound & (loss < trial.loss)
            best, loss = tree_where(lower, (step, loss), (trial.best, trial.loss))
            going = (first | lower) & (trial.evaluations < corrections)
            return _Trial(step, z, best, loss, trial.evaluations + 1, going)

        infinite = jnp.full((), jnp.inf, dtype)
        none = jnp.zeros((), jnp.int32)
        start = _Trial(straight, output, straight, infinite, none, jnp.array(True))
        found = jax.lax.while_loop(lambda trial: trial.going, corrected, start)
        return found.loss, found.best
