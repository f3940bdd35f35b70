"""Where a step goes: the solution of the damped system, with momentum, and maybe bent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.control.momentum import best_of_plane, spring_rhs
from fvp.numerics import computed_once, tree_is_finite, tree_scale, tree_vdot
from fvp.solvers import CGInfo, DampedSystem
from fvp.transforms.geodesic import geodesic_correction
from fvp.transforms.options import Options
from fvp.typing import Params

WARM_START_DECAY = 0.95  # docs/decisions/steps.md


class Path(NamedTuple):
    """The steps s d + s^2/2 c for lengths s, to be subtracted; straight where c is None."""

    direction: Params
    correction: Params | None

    def step(self, length: Any) -> Params:
        """The step of one length, in the dtypes of the direction."""
        if self.correction is None:
            return tree_scale(length, self.direction)
        length, bend = computed_once((length, 0.5 * jnp.square(length)))
        add = lambda d, c: (length * d + bend * c).astype(d.dtype)
        return jax.tree.map(add, self.direction, self.correction)


class Direction(NamedTuple):
    """A path and the quadratic model along its direction d; scalars in float32 or wider."""

    path: Path
    slope: Array  # gradient . d
    curvature: Array  # d . F d
    damping_term: Array  # damping d . D d
    descent: Array  # bool: everything is finite and the model falls along d
    info: CGInfo  # of the solve


def find_direction(
    options: Options, system: DampedSystem, gradient: Params, previous: Params, momentum: Any
) -> Direction:
    """Solves for ``gradient``; ``previous`` is the last direction, ``momentum`` how much of it.

    A momentum of None leaves the last direction out of the right-hand side. Where the solver gives
    a direction only, and under ``momentum="quadratic"``, the exact curvature chooses the length.
    """
    damped, rhs, start = system.damped, gradient, None
    if momentum is not None:
        rhs = spring_rhs(gradient, damped.damp(previous), momentum)
        start = tree_scale(momentum, previous)
    elif options.solver.warm_start:
        start = tree_scale(WARM_START_DECAY, previous)
    solution, info = system.solve(rhs, start)
    descent = jnp.isfinite(info.residual_norm) & (info.model_value < 0)
    curvature, damping_term = info.curvature, info.damping_term
    if options.plane or options.solver.approximate:
        last = previous if options.plane else None
        solution, curvature = best_of_plane(damped, gradient, solution, last)
        damping_term = tree_vdot(solution, damped.damp(solution))
        descent &= tree_is_finite(solution)
    slope = tree_vdot(gradient, solution)
    if options.solver.approximate:
        descent = tree_is_finite(solution) & jnp.isfinite(curvature) & (slope > 0)
    correction = None
    if options.geodesic and options.line_search != "loss":  # which bends each length that it tries
        correction = geodesic_correction(system, solution)
    return Direction(Path(solution, correction), slope, curvature, damping_term, descent, info)
