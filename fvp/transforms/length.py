"""How far a step goes: the learning rate, the bound on its divergence, a line search."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fvp.control.trust_region import SLACK, length_within_kl
from fvp.solvers import DampedSystem
from fvp.transforms.bent_search import BentSearch
from fvp.transforms.direction import Direction, Path
from fvp.transforms.objective import Objective
from fvp.transforms.options import Options
from fvp.typing import Params

UNTRIED_KL = 0.1  # bound where no loss can try an adaptive step; docs/decisions/steps.md


class Length(NamedTuple):
    """How far along a direction d; scalars."""

    length: Array  # the multiple of d
    part: Array  # of the learning rate that is left
    predicted_kl: Array  # 1/2 s^T F s of the step s
    stuck: Array  # bool: no length is short enough
    loss: Array | None  # after the step, where a search knows it
    step: Params | None  # to be subtracted, where it is not that of the path


@dataclasses.dataclass(frozen=True)
class Moves:
    """The parameters after a step, rounded as optax will round it."""

    params: Params
    path: Path
    like: Params  # the gradient, whose dtypes the update has

    def __call__(self, length: Any) -> Params:
        """After the step of one length."""
        return self.after(self.path.step(length))

    def after(self, step: Params) -> Params:
        """After a step that is subtracted."""
        step = jax.tree.map(lambda x, g: (-x).astype(g.dtype), step, self.like)
        return optax.apply_updates(self.params, step)


def choose_length(
    options: Options,
    objective: Objective,
    system: DampedSystem,
    direction: Direction,
    moves: Moves,
    rate: Any,
) -> Length:
    """From the learning rate ``rate``: shortened by the bound, then by the search."""
    # A curvature is never below zero, but by rounding.
    predicted = jnp.maximum(0.5 * jnp.square(rate) * direction.curvature, 0)
    length, part, stuck, loss = rate, jnp.ones(()), jnp.array(False), None
    limit = options.max_kl
    if limit is None and options.rule.adapts and not objective.data.has_loss:
        limit = UNTRIED_KL
    if limit is not None:
        exact = None
        if objective.problem is not None:
            exact = lambda a, length=length: objective.divergence(moves(a * length))
        shrink = length_within_kl(predicted, limit, exact, constant=options.constant_kl)
        stuck = shrink == 0
        length, part, predicted = shrink * length, shrink * part, jnp.square(shrink) * predicted
    step = None
    if options.line_search == "loss":
        objective.check_has_loss()
        if options.geodesic:
            allowed = lambda z: limit is None or objective.kl(z) <= SLACK * limit
            d = direction.path.direction
            search = BentSearch(objective, system, d, length, moves.after, allowed)
            shrink, loss, step = search()
            stuck |= ~jnp.isfinite(loss)
        else:
            shrink, loss = objective.search_loss(lambda a, length=length: moves(a * length))
        length, part, predicted = shrink * length, shrink * part, jnp.square(shrink) * predicted
    elif options.line_search == "outputs":
        shrink = objective.search_outputs(direction.path.direction, length)
        length, part, predicted = shrink * length, shrink * part, jnp.square(shrink) * predicted
    return Length(jnp.asarray(length), part, predicted, stuck, loss, step)
