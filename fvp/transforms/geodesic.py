"""Geodesic acceleration: steps that bend with the model's outputs."""

from __future__ import annotations

import jax

from fvp.curvature import Problem
from fvp.numerics import cast_like, tree_is_finite, tree_norm, tree_where, tree_zeros_like
from fvp.solvers import DampedSystem
from fvp.typing import Params

# Of the correction against the direction; docs/decisions/steps.md
LONGEST = 0.75


def problem_of(system: DampedSystem) -> Problem:
    """The problem whose outputs bend; raises where the curvature knows none."""
    problem = system.damped.operator.problem
    if problem is None:
        raise ValueError("geodesic: expected a curvature of the form J^T H J without chunk_size.")
    return problem


def geodesic_correction(system: DampedSystem, direction: Params) -> Params:
    """The c of the path params - (s d + s^2/2 c), along which J c takes back the bend of z.

    c = (F + Lambda)^-1 J^T H_L z'' with z'' the second derivative of the outputs along d, from one
    JVP of a JVP. Zeros where c is not finite, or longer than 3/4 of d: beyond, nothing is known.

    Reference:
      M. Transtrum, J. Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear
      least-squares minimization, 2012.
    """
    problem = problem_of(system)
    tangent = cast_like(direction, problem.params)
    slope = lambda params: jax.jvp(problem.outputs, (params,), (tangent,))[1]
    _, bend = jax.jvp(slope, (problem.params,), (tangent,))
    correction = system.solve_outputs(bend)
    usable = tree_is_finite(correction)
    usable &= tree_norm(correction) <= LONGEST * tree_norm(direction)
    return cast_like(tree_where(usable, correction, tree_zeros_like(correction)), direction)
