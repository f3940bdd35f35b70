"""Momentum: the previous direction in the next system, or in the next quadratic model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import tree_vdot, widen_tree


def spring_rhs(gradient: Any, damping: Array, momentum: Any, previous: Any) -> Any:
    """The right-hand side g + damping * momentum * d_prev, in the dtypes of the gradient.

    (F + damping I) d = this minimises the model -g.d + 1/2 d^T F d + damping/2 |d - momentum
    d_prev|^2: damping pulls towards the decayed old direction instead of zero, so that what
    earlier batches said survives where this batch says nothing.

    Reference:
      G. Goldshlager, N. Abrahamsen, L. Lin, A Kaczmarz-inspired approach to accelerate the
      optimization of neural network wavefunctions, 2024 (SPRING).
    """
    scale = damping * momentum
    return jax.tree.map(
        lambda g, d: (g + scale.astype(jnp.promote_types(g.dtype, jnp.float32)) * d).astype(
            g.dtype
        ),
        gradient,
        previous,
    )


def quadratic_model_step(
    operator: Any, gradient: Any, damping: Array, direction: Any, curvature: Array, previous: Any
) -> tuple[Any, Array, Array]:
    """Minimises the damped model over the plane of the direction and the previous step.

    With A = F + damping I solves [[d.Ad, d.Au], [d.Au, u.Au]] (a, m) = (g.d, g.u) for the step
    a d + m u, from one product with u. Where u is zero or parallel to d, m is zero.

    Args:
      operator: the curvature F.
      gradient: pytree g.
      damping: multiple of the identity, the l2 term included.
      direction: pytree d, the new direction.
      curvature: d.Fd, known from the solve.
      previous: pytree u, the previous step; zeros at first.

    Returns:
      The step, and its s.Fs and s.s.

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 7.
    """
    d, u = widen_tree(direction), widen_tree(previous)
    product = widen_tree(operator.mv(previous))
    dd, du, uu = tree_vdot(d, d), tree_vdot(d, u), tree_vdot(u, u)
    fdu, fuu = tree_vdot(d, product), tree_vdot(u, product)
    gd, gu = tree_vdot(gradient, d), tree_vdot(gradient, u)
    p, q, r = curvature + damping * dd, fdu + damping * du, fuu + damping * uu
    determinant = p * r - q * q
    plane = determinant > 1e-4 * p * r  # below, rounding in float32 would choose the step
    safe = jnp.where(plane, determinant, 1)
    a = jnp.where(plane, (r * gd - q * gu) / safe, gd / p)
    m = jnp.where(plane, (p * gu - q * gd) / safe, 0)
    step = jax.tree.map(lambda x, y, z: (a * x + m * y).astype(z.dtype), d, u, direction)
    return (
        step,
        a * a * curvature + 2 * a * m * fdu + m * m * fuu,
        a * a * dd + 2 * a * m * du + m * m * uu,
    )
