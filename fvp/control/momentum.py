"""Momentum: the previous direction in the next system, or in the next quadratic model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fvp.numerics import cast_like, tree_axpy, tree_vdot, unit, widen_tree


def spring_rhs(gradient: Any, pull: Any, momentum: Any) -> Any:
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


def quadratic_model_step(
    operator: Any, damp: Callable[[Any], Any], gradient: Any, direction: Any, previous: Any
) -> tuple[Any, Any]:
    """Minimises the damped model over the plane of the direction and the previous step.

    With A = F + Lambda solves [[d.Ad, d.Au], [d.Au, u.Au]] (a, m) = (g.d, g.u) for the step
    a d + m u, from one product with each. Where u is zero or parallel to d, m is zero.

    Args:
      operator: the curvature F.
      damp: ``v -> Lambda v``, the damping and the l2 term.
      gradient: pytree g.
      direction: pytree d, the new direction.
      previous: pytree u, the previous step; zeros at first.

    Returns:
      The step s, and F s.

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 7.
    """
    d, u = widen_tree(direction), widen_tree(previous)
    # Each is brought to unit length first: the products of tiny steps would underflow.
    d, u = unit(d), unit(u)
    fd, fu = (widen_tree(operator.mv(cast_like(x, y))) for x, y in ((d, direction), (u, previous)))
    ad, au = tree_axpy(1, damp(d), fd), tree_axpy(1, damp(u), fu)
    p, q, r = tree_vdot(d, ad), tree_vdot(u, ad), tree_vdot(u, au)
    gd, gu = tree_vdot(gradient, d), tree_vdot(gradient, u)
    determinant = p * r - q * q
    plane = determinant > 1e-4 * p * r  # below, rounding in float32 would choose the step
    safe = jnp.where(plane, determinant, 1)
    a = jnp.where(plane, (r * gd - q * gu) / safe, gd / jnp.where(p > 0, p, 1))
    m = jnp.where(plane, (p * gu - q * gd) / safe, 0)
    combine = lambda x, y: a.astype(x.dtype) * x + m.astype(y.dtype) * y
    return cast_like(jax.tree.map(combine, d, u), direction), jax.tree.map(combine, fd, fu)
