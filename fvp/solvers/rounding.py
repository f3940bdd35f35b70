"""What rounding asks of exact solves: damping above it, and differences that are nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import CurvatureOperator
from fvp.numerics import tree_vdot, tree_where, tree_zeros_like, wide_dtype
from fvp.solvers.damped import DampedCurvature
from fvp.typing import Params

# Least damping of an exact solve over the norm of the gradient: below, where the curvature vanishes
# in float32, the squared norm of the solution would overflow; docs/decisions/solvers.md
_LEAST = 2.0**-60
# Least damping of a Cholesky factorisation over eps trace(F), its own rounding; of a QR
# factorisation of the root the square of both.
ROUNDING = 8.0  # docs/decisions/solvers.md
REFINEMENTS = 3  # each takes the rounding back to a hundredth; docs/decisions/solvers.md


def holds_digits(operator: CurvatureOperator) -> bool:
    """Whether all parameters are in float32 or wider."""
    return all(leaf.dtype == wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(operator.like))


def above_noise(rest: Params, whole: Params) -> Params:
    """``rest`` of a difference, or zeros where it is the rounding of the ``whole``."""
    level = 64 * jnp.finfo(jnp.result_type(*jax.tree.leaves(whole))).eps
    noise = tree_vdot(rest, rest) <= level**2 * tree_vdot(whole, whole)
    return tree_where(noise, tree_zeros_like(rest), rest)


def above_rounding(
    damped: DampedCurvature, least: Array, norm: Array
) -> tuple[DampedCurvature, Array]:
    """The same with as much damping as rounding wants, and damping + l2.

    At least ``least``, and a part of the ``norm`` of the gradient, also where F vanishes.
    """
    shift = 0.0 if damped.l2 is None else damped.l2
    total = jnp.maximum(jnp.asarray(damped.damping + shift, least.dtype), least)
    total = jnp.maximum(total, jnp.asarray(norm * _LEAST, least.dtype))
    return dataclasses.replace(damped, damping=total - shift), total


def above_rounding_of_root(
    damped: DampedCurvature, trace: Array, norm: Array
) -> tuple[DampedCurvature, Array, Array]:
    """`above_rounding` for a factorisation of the root of F, and the damping that F would want."""
    eps, tiny = float(jnp.finfo(trace.dtype).eps), float(jnp.finfo(trace.dtype).tiny)
    root = (ROUNDING * eps) ** 2 * trace
    damped, total = above_rounding(damped, root, jnp.where(root > tiny, 0, norm))
    return damped, total, ROUNDING * eps * trace
