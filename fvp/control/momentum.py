"""Momentum: the previous direction in the next system, or in the next quadratic model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import cast_like, pairwise, tree_axpy, tree_vdot, unit, widen_tree
from fvp.solvers import DampedCurvature
from fvp.typing import Params


def spring_rhs(gradient: Params, pull: Params, momentum: Any) -> Params:
    """The right-hand side g + momentum * Lambda d_prev, in the dtypes of the gradient.

    With Lambda the damping, (F + Lambda) d = this minimises the model -g.d + 1/2 d^T F d +
    1/2 |d - momentum d_prev|^2_Lambda: damping pulls towards the decayed old direction instead of
    zero, so that what earlier batches said survives where this batch says nothing.

    Args:
      gradient: pytree g.
      pull: pytree Lambda d_prev.
      momentum: number in [0, 1).

    Reference:
      G. Goldshlager, N. Abrahamsen, L. Lin, A Kaczmarz-inspired approach to accelerate the
      optimization of neural network wavefunctions, 2024 (SPRING).
    """
    return tree_axpy(momentum, pull, gradient)


def best_of_plane(
    damped: DampedCurvature, gradient: Params, direction: Params, previous: Params | None
) -> tuple[Params, Array]:
    """Minimises the damped model over the plane of the direction and the previous step.

    With A = F + Lambda solves [[d.Ad, d.Au], [d.Au, u.Au]] (a, m) = (g.d, g.u) for the step
    a d + m u; a JVP with each is all that F costs. Where u is zero or parallel to d, m is zero.

    Args:
      damped: the curvature F with its damping and l2 term, Lambda together.
      gradient: pytree g.
      direction: pytree d, the new direction.
      previous: pytree u, the previous step; zeros at first. None leaves it out.

    Returns:
      The step s, to be subtracted, and s^T F s.

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 7.
    """
    vectors = [direction] if previous is None else [direction, previous]
    # Each is brought to unit length first: the products of tiny steps would underflow.
    vectors = [unit(widen_tree(v)) for v in vectors]
    curvature = damped.operator.inner_products(*(cast_like(v, direction) for v in vectors))
    slopes = [tree_vdot(gradient, v) for v in vectors]
    matrix = curvature + pairwise(tree_vdot, vectors, [damped.damp_all(v) for v in vectors])
    p = matrix[0, 0]
    lengths = [slopes[0] / jnp.where(p > 0, p, 1)]
    if previous is not None:
        q, r = matrix[0, 1], matrix[1, 1]
        determinant = p * r - q * q
        plane = determinant > 1e-4 * p * r  # below, rounding in float32 would choose the step
        safe = jnp.where(plane, determinant, 1)
        lengths = [
            jnp.where(plane, (r * slopes[0] - q * slopes[1]) / safe, lengths[0]),
            jnp.where(plane, (p * slopes[1] - q * slopes[0]) / safe, 0),
        ]
    combine = lambda *xs: sum(a.astype(x.dtype) * x for a, x in zip(lengths, xs, strict=True))
    step, weights = cast_like(jax.tree.map(combine, *vectors), direction), jnp.stack(lengths)
    return step, weights @ curvature.astype(weights.dtype) @ weights
