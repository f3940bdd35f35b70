"""The loss and the divergence of the parameters that a step leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control import Outcome, Step
from fvp.control.line_search import halving_search, output_search
from fvp.control.record import unknown_outcome
from fvp.control.trial import divergence_outcome, loss_outcome, mean_kl, mean_nll
from fvp.curvature.linearization import Linearization
from fvp.numerics import cast_like, tree_vdot
from fvp.transforms.options import Data, Options
from fvp.transforms.subset import fill_masked, has_masked_nodes


class Path(NamedTuple):
    """The steps s d + s^2/2 c for lengths s, to be subtracted; straight where c is None."""

    direction: Any
    correction: Any

    def step(self, length: Any) -> Any:
        """The step of one length, in the dtypes of the direction."""
        if self.correction is None:
            return jax.tree.map(lambda d: (length * d).astype(d.dtype), self.direction)
        bend = 0.5 * jnp.square(length)
        add = lambda d, c: (length * d + bend * c).astype(d.dtype)
        return jax.tree.map(add, self.direction, self.correction)


def moves(params: Any, path: Path, like: Any, length: Any) -> Callable[[Any], Any]:
    """``a -> params`` after the step of a times ``length``, rounded as optax will round it."""

    def at(a: Any) -> Any:
        step = jax.tree.map(lambda x, g: (-x).astype(g.dtype), path.step(a * length), like)
        return optax.apply_updates(params, step)

    return at


def divergence(options: Options, operator: Any, new_params: Any, data: Data) -> Array:
    """Exact mean KL from the model at ``operator`` to the one at ``new_params``."""
    z_new = _outputs(options, new_params, data)
    return mean_kl(options.head, operator.output, z_new, data.weights, options.axis_name)


def try_step(
    options: Options,
    operator: Any,
    params: Any,
    at: Callable[[Any], Any],
    record: Step,
    predicted_kl: Array,
    data: Data,
    after: Array | None,
) -> Outcome:
    """Tries the step on the loss where there is one, else on the divergence that it makes.

    ``after`` is the loss after the step where a search knows it.
    """
    if data.has_loss:
        loss = _loss(options, data)
        before = loss_before(options, operator, params, data)
        return loss_outcome(record, before, lambda _: loss(at(1)) if after is None else after)
    if data.batch is None:
        return unknown_outcome(record)
    return divergence_outcome(record, predicted_kl, divergence(options, operator, at(1), data))


def gradient_differs(
    operator: Any, gradient: Any, solution: Any, length: Any, outcome: Outcome, targets: Any
) -> Array:
    """Whether ``gradient`` is not that of the mean nll, told by their slopes along the step.

    A tenth apart, and by more than the loss is rounded along it. Costs a backward pass.
    """
    _, own = operator.value_and_grad(targets)
    slopes = [tree_vdot(g, solution) for g in (gradient, own)]
    largest = jnp.maximum(*map(jnp.abs, slopes))
    gap = jnp.abs(slopes[0] - slopes[1])
    rounding = jnp.where(jnp.isfinite(outcome.rounding), outcome.rounding, 0)
    return (gap > 0.1 * largest) & (gap * jnp.abs(jnp.asarray(length)) > rounding)


def loss_before(options: Options, operator: Any, params: Any, data: Data) -> Array:
    """The loss at ``params``, with the l2 term."""
    before = data.loss_before
    if data.value_fn is None:
        before = _nll(options, data)(operator.output)
    elif before is None:
        before = data.value_fn(_whole(params, data), data.batch)
    return jnp.asarray(before) + _penalty(options, params)


def search_length(
    options: Options,
    operator: Any,
    params: Any,
    solution: Any,
    length: Any,
    at: Callable[[Any], Any],
    data: Data,
) -> tuple[Array, Array | None]:
    """The multiple of the step that the line search prefers, and the loss there if it knows it."""
    if options.line_search == "loss":
        if not data.has_loss:
            raise ValueError('line_search: "loss" expects batch=, and targets= or value_fn=.')
        loss = _loss(options, data)
        before = loss_before(options, operator, params, data)
        return halving_search(lambda a: loss(at(a)), before)
    if data.batch is None or data.targets is None:
        raise ValueError('line_search: "outputs" expects batch= and targets=.')
    linearization = Linearization.of(lambda p: _outputs(options, p, data), params)
    change = length * linearization.jvp(cast_like(solution, params))
    change = change.astype(operator.output.dtype)
    loss = _nll(options, data)
    return output_search(loss, operator.output, change, loss(operator.output))[0], None


def _loss(options: Options, data: Data) -> Callable[[Any], Array]:
    """The loss of parameters, with the l2 term."""
    if data.value_fn is not None:
        value = lambda p: jnp.asarray(data.value_fn(_whole(p, data), data.batch))
    else:
        value = lambda p: _nll(options, data)(_outputs(options, p, data))
    return lambda p: value(p) + _penalty(options, p)


def _nll(options: Options, data: Data) -> Callable[[Array], Array]:
    return lambda z: mean_nll(options.head, z, data.targets, data.weights, options.axis_name)


def _penalty(options: Options, params: Any) -> Any:
    return 0 if options.l2 is None else 0.5 * options.l2 * tree_vdot(params, params)


def _outputs(options: Options, params: Any, data: Data) -> Array:
    return options.model_fn(_whole(params, data), data.batch)


def _whole(params: Any, data: Data) -> Any:
    return fill_masked(params, data.all_params) if has_masked_nodes(params) else params
