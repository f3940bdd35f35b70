"""Conjugate gradients on pytrees.

Differences from the textbook, and why:
- The right-hand side is divided by a power of two near its norm first and the solution multiplied
  back, so that nothing under- or overflows late in training, and scaling the right-hand side by a
  power of two scales the solution to the last bit. There is no absolute epsilon.
- Vectors and inner products are kept in float32 or wider, whatever the dtype of the leaves; the
  search direction alone is rounded to it, so that the product is of the direction that x moves in.
- A curvature that is not positive, or a value that is not finite, ends the solve at the last good
  iterate and is reported. Positive means above rounding: 4 eps times the largest curvature met,
  free of the size.
- Inner products never flatten a leaf: sharded leaves stay as they are.
- The residual that the recurrence carries drifts from the true one, by up to about eps times the
  number of iterations times |A| times the largest |x| met (Greenbaum 1997). Where that could matter
  to the tolerance, "converged" is not believed before the true residual says so as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_like, check_nonnegative
from fvp.solvers.cg_iteration import CGInfo, LinearSystem, solve_compiled
from fvp.solvers.implicit import solve_implicitly
from fvp.typing import Params


def cg(
    operator: Any,
    rhs: Params,
    *,
    damping: ArrayLike = 0.0,
    x0: Params | None = None,
    tol: ArrayLike = 1e-5,
    atol: ArrayLike = 0.0,
    maxiter: Any = None,
    M: Callable[[Any], Any] | None = None,
    progress_tol: ArrayLike = 0.0,
) -> tuple[Params, CGInfo]:
    """Solves (A + damping I) x = rhs for a symmetric positive definite A + damping I.

    Where rounding could have parted the residual of the recurrence from the true one (mostly in
    float32; at ill-conditioned A; at an ``x0`` far off), one product more tells at the end
    whether the tolerance is met. If not, the solve goes on from the true residual, until it
    is, or until a second check finds it hardly smaller: the dtype then holds no better x, and
    ``converged`` is False. ``tol=0`` with ``atol=0`` is never checked.

    Differentiable in ``operator`` (its leaves, or what a callable closes over), ``rhs`` and
    ``damping``, in forward and reverse mode: the derivatives are those of the exact solution, at
    another solve each, to the same relative tolerance and within as many iterations.

    Args:
      operator: a curvature operator, or any linear callable ``v -> A v`` on trees like ``rhs``.
      rhs: pytree of floating-point arrays.
      damping: multiple of the identity added to A; a number or a scalar array.
      x0: initial guess like ``rhs``; zeros, at no product, when None.
      tol: stop when the residual norm is at most ``tol`` times the norm of rhs.
      atol: stop when the residual norm is at most ``atol``.
      maxiter: most iterations; 10 times the number of unknowns when None. With ``tol=0`` and
        ``atol=0`` it is a fixed count, ended early only by an exact solution.
      M: approximates the inverse of A + damping I: a callable, or an object with ``mv``.
      progress_tol: when positive, stop also on relative progress of the quadratic model phi:
        at iteration i > k with phi_i < 0 and (phi_i - phi_{i-k}) / phi_i < k * progress_tol, where
        k = max(10, ceil(i / 10)). Martens (2010) uses 5e-4. With a traced ``maxiter``, k <= 1024.

    Returns:
      ``(x, info)``: x in the dtypes of ``rhs``, and a `CGInfo`. On breakdown x is the last
      good iterate, zeros at worst.

    Raises:
      ValueError: for trees that do not fit ``rhs``, or numbers that are negative or not finite.
      TypeError: for leaves that are not floating-point.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, info = fvp.cg(lambda v: 3 * v, jnp.array([2.0, 6.0]), damping=1.0)
      >>> print(x, info.iterations, info.converged)
      [0.5 1.5] 1 True

    Reference:
      M. Hestenes, E. Stiefel, 1952; J. Martens, Deep learning via Hessian-free optimization, 2010,
      section 4.4.
    """
    rhs = check_inexact_tree(rhs, "rhs")
    limit, window = iteration_limit(rhs, maxiter)
    if isinstance(progress_tol, (int, float)) and progress_tol == 0:
        window = 0
    options = {"damping": damping, "tol": tol, "atol": atol, "progress_tol": progress_tol}
    for name, value in options.items():
        check_nonnegative(value, name)
    verify = not all(isinstance(value, (int, float)) and value == 0 for value in (tol, atol))
    x0 = None if x0 is None else check_like(x0, rhs, "x0", "rhs")
    for name, linear_map in (("operator", operator), ("M", M)):
        if not (callable(linear_map) or hasattr(linear_map, "mv") or linear_map is M is None):
            raise TypeError(
                f"{name}: expected an operator or a callable v -> A v, got {linear_map!r}."
            )
    system = LinearSystem(
        operator,
        M=M,
        limit=limit,
        window=window,
        verify=verify,
        **options,
    )
    leaves = jax.tree.leaves((system, rhs, x0))
    # A function may read state that changes between calls, so it is never compiled for later calls.
    if any(isinstance(leaf, Tracer) or callable(leaf) for leaf in leaves):
        return solve_implicitly(system, rhs, x0)
    return solve_compiled(system, rhs, x0)


def iteration_limit(rhs: Any, maxiter: Any) -> tuple[Any, int]:
    """The most iterations, and the longest look back of the progress test."""
    if maxiter is None:
        maxiter = min(10 * sum(leaf.size for leaf in jax.tree.leaves(rhs)), 2**31 - 1)
    if isinstance(maxiter, Tracer):
        return maxiter, 1024
    if isinstance(maxiter, jax.Array):
        maxiter = maxiter.item()  # while something is traced, comparing an array would be, too
    if maxiter != int(maxiter) or maxiter < 0:
        raise ValueError(f"maxiter: expected an integer of 0 or more, got {maxiter}.")
    return int(maxiter), min(max(10, -(-int(maxiter) // 10)), 2**20)
