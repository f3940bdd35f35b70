"""Geodesic acceleration: steps that bend with the model's outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import cast_like, tree_is_finite, tree_norm, tree_where, tree_zeros_like
from fvp.solvers import DampedSystem
from fvp.typing import Params

# Of the correction against the direction; docs/decisions/steps.md
_LONGEST = 0.75


def trusted_part(direction: Params, correction: Params, length: Any) -> Array:
    """The part of ``length`` s that keeps |s c| within 3/4 of |d|: beyond, nothing is known.

    Without this bound a first step may end where the model is flat, at a loss that is lower and
    never falls again.
    """
    bend = jnp.abs(length) * tree_norm(correction)
    longest = _LONGEST * tree_norm(direction)
    return jnp.where(bend > longest, longest / jnp.where(bend > longest, bend, 1), 1)


def geodesic_correction(system: DampedSystem, direction: Params, *, searched: bool) -> Params:
    """The c of the path params - (s d + s^2/2 c), along which J c takes back the bend of z.

    c = (F + Lambda)^-1 J^T H_L z'' with z'' the second derivative of the outputs along d, from one
    JVP of a JVP. Zeros where c is not finite, and unless the length s is ``searched`` by the loss,
    from `trusted_part` down, where it is longer than 3/4 of d.

    Reference:
      M. Transtrum, J. Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear
      least-squares minimization, 2012.
    """
    problem = system.damped.operator.problem
    if problem is None:
        raise ValueError("geodesic: expected a curvature of the form J^T H J without chunk_size.")
    tangent = cast_like(direction, problem.params)
    slope = lambda params: jax.jvp(problem.outputs, (params,), (tangent,))[1]
    _, bend = jax.jvp(slope, (problem.params,), (tangent,))
    correction = system.solve_outputs(bend)
    usable = tree_is_finite(correction)
    if not searched:
        usable &= tree_norm(correction) <= _LONGEST * tree_norm(direction)
    return cast_like(tree_where(usable, correction, tree_zeros_like(correction)), direction)
