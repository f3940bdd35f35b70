"""What a damping rule is: how much damping a step gets, and what is learned from trying it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fvp.control.record import Outcome, Step
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a rule sees before the solve.

    Attributes:
      count: int32, number of the step.
      gradient: pytree g, with that of the l2 term.
      norm: scalar, |g|.
      last: the direction of the last step, like the parameters, zeros at first and after a
        rejection.
      rayleigh: ``rayleigh()`` is g^T F g / g^T g, at the cost of a JVP where it is called.
    """

    count: Array
    gradient: Params
    norm: Array
    last: Params
    rayleigh: Callable[[], Array]


class DampingRule(abc.ABC):
    """Chooses the damping of each step: the base of the library's rules, and of your own.

    A frozen dataclass of options, passed as ``damping=``. Its state is a pytree of arrays of fixed
    shapes and dtypes. A step that raises the loss is rejected whatever the rule, unless nothing
    `adapts`.

    Examples:
      >>> import dataclasses, jax.numpy as jnp, fvp
      >>> @dataclasses.dataclass(frozen=True)
      ... class ByGradient(fvp.DampingRule):
      ...     "Proportional to the norm of the gradient; ten times that after a rejection."
      ...     factor: float = 1.0
      ...     def init(self, params):
      ...         return jnp.ones(())
      ...     def propose(self, state, observation):
      ...         return state, self.factor * state * observation.norm
      ...     def correct(self, state, step, outcome, accepted):
      ...         return jnp.where(accepted, 1.0, 10.0)
      >>> tx = fvp.scale_by_fisher(lambda w, x: x @ w, fvp.Gaussian(), damping=ByGradient())
      >>> tx = fvp.scale_by_kfac(lambda w, x: x @ w, fvp.Gaussian(), damping=ByGradient())
    """

    #: Whether the damping follows the outcome of steps: each is then tried before it is returned.
    adapts: ClassVar[bool] = True
    #: Whether it may propose no damping at all, which only direct solvers can do with.
    needs_direct: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, params: Params) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def propose(self, state: PyTree, observation: Observation) -> tuple[PyTree, Array]:
        """Takes in a new gradient; returns the state, and the damping of this step."""

    @abc.abstractmethod
    def correct(self, state: PyTree, step: Step, outcome: Outcome, accepted: Array) -> PyTree:
        """The state after a step was tried, and ``accepted`` or not."""

    def diagonal(self, state: PyTree) -> PyTree:
        """The D of damping D, of mean 1, for solvers that take one; None is the identity."""
        del state

    def momentum(self, state: PyTree, count: Array) -> Any:
        """How much of the last direction enters where the user has not said; None is nothing."""
        del state, count

    def agrees(self, state: PyTree) -> Array:
        """Whether gradients still point along the steps before them: full batches."""
        del state
        return jnp.array(True)

    def noisy(self, state: PyTree) -> Array:
        """Whether the noise of the batches leads."""
        del state
        return jnp.array(False)
