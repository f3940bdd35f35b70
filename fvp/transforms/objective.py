"""The loss and the divergence of the parameters that a step leads to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.line_search import halving_search, output_search
from fvp.curvature import CurvatureOperator, Problem
from fvp.curvature.linearization import Linearization
from fvp.numerics import cast_like, tree_axpy, tree_vdot
from fvp.transforms.subset import fill_masked, has_masked_nodes
from fvp.typing import Params


class Data(NamedTuple):
    """The keywords of ``update`` that say what the loss is."""

    batch: Any = None
    targets: Any = None
    weights: Any = None
    all_params: Any = None
    value: Any = None  # of the loss at the parameters
    value_fn: Any = None

    @property
    def has_loss(self) -> bool:
        """Whether a step can be tried on the loss."""
        return self.batch is not None and (self.targets is not None or self.value_fn is not None)

    @property
    def tries_nll(self) -> bool:
        """Whether that loss is the head's mean nll."""
        return self.has_loss and self.value_fn is None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What steps from ``params`` are tried on; lives inside one step.

    Attributes:
      operator: the curvature at ``params``, which knows the outputs there.
      params: those of the transformation, maybe with part of them masked.
      problem: the head's loss at the batch; None without a batch.
      data: the keywords of ``update``.
      l2: of the penalty, or None.
      before: the loss at the parameters, where it is known.
    """

    operator: CurvatureOperator
    params: Params
    problem: Problem | None
    data: Data
    l2: Any
    before: Array | None = None

    def knowing(self, before: Array) -> Objective:
        """With the loss at the parameters, as `loss_before` gave it."""
        return dataclasses.replace(self, before=before)

    def nll(self, z: Array) -> Array:
        """The head's mean nll of the outputs ``z``, up to a term of the targets alone."""
        assert self.problem is not None
        return self.problem.loss(z)

    def outputs(self, params: Params) -> Array:
        """The model's z."""
        assert self.problem is not None
        return self.problem.outputs(params)

    def gradient_with_penalty(self, gradient: Params) -> Params:
        """The gradient of the loss with its l2 term, from that without."""
        return with_penalty(gradient, self.params, self.l2)

    @property
    def output_dtype(self) -> Any:
        """Of the model's outputs."""
        return jax.eval_shape(lambda: self.operator.linearized.output).dtype

    def divergence(self, params: Params) -> Array:
        """Exact mean KL from the model at the operator to the one at ``params``."""
        return self.kl(self.outputs(params))

    def kl(self, z: Array) -> Array:
        """Exact mean KL from the model at the operator to the one with the outputs ``z``."""
        assert self.problem is not None
        return self.problem.kl(self.operator.linearized.output, z)

    def loss(self, params: Params) -> Array:
        """The loss of other parameters, with the l2 term."""
        if self.data.value_fn is not None:
            value = jnp.asarray(self.data.value_fn(self._whole(params), self.data.batch))
        else:
            value = self.nll(self.outputs(params))
        return value + self._penalty(params)

    def loss_before(self) -> Array:
        """The loss at the parameters, with the l2 term."""
        if self.before is not None:
            return self.before
        value = self.data.value
        if self.data.value_fn is None:
            value = self.nll(self.operator.linearized.output)
        elif value is None:
            value = self.data.value_fn(self._whole(self.params), self.data.batch)
        return jnp.asarray(value) + self._penalty(self.params)

    def check_has_loss(self) -> None:
        """Raises unless steps can be tried on the loss."""
        if not self.data.has_loss:
            raise ValueError('line_search: "loss" expects batch=, and targets= or value_fn=.')

    def search_loss(self, at: Callable[[Any], Params]) -> tuple[Array, Array]:
        """The length that the loss prefers among steps to ``at(length)``, and the loss there."""
        return halving_search(lambda a: (self.loss(at(a)), None), self.loss_before())[:2]

    def search_outputs(self, direction: Params, length: Any) -> Array:
        """The multiple of ``length`` that the loss of the linearised outputs prefers."""
        if self.data.batch is None or self.data.targets is None:
            raise ValueError('line_search: "outputs" expects batch= and targets=.')
        model = Linearization.of(self.outputs, self.params)
        z = self.operator.linearized.output
        change = (length * model.jvp(cast_like(direction, self.params))).astype(z.dtype)
        return output_search(self.nll, z, change, self.nll(z))[0]

    def gradient_differs(self, gradient: Params, direction: Params, least: Array) -> Array:
        """Whether ``gradient`` is not that of the mean nll, told by their slopes along a direction.

        A tenth apart, and by more than ``least``. Costs a backward pass.
        """
        _, own = self.operator.value_and_grad(self.data.targets)
        slopes = [tree_vdot(g, direction) for g in (gradient, own)]
        largest = jnp.maximum(*map(jnp.abs, slopes))
        gap = jnp.abs(slopes[0] - slopes[1])
        return (gap > 0.1 * largest) & (gap > least)

    def _penalty(self, params: Params) -> Any:
        return 0 if self.l2 is None else 0.5 * self.l2 * tree_vdot(params, params)

    def _whole(self, params: Params) -> Params:
        masked = has_masked_nodes(params)
        return fill_masked(params, self.data.all_params) if masked else params


def with_penalty(gradient: Params, params: Params, l2: Any) -> Params:
    """The gradient with that of l2/2 |params|^2, where l2 is not None."""
    return gradient if l2 is None else tree_axpy(l2, cast_like(params, gradient), gradient)
