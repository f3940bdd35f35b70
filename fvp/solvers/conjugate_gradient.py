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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_like, check_nonnegative
from fvp.compilation import compiled_when_eager
from fvp.numerics import (
    cast_like,
    power_of_two,
    tree_axpy,
    tree_is_finite,
    tree_norm,
    tree_vdot,
    tree_where,
    tree_zeros_like,
    wide_dtype,
    widen_tree,
)


class CGInfo(NamedTuple):
    """How a solve went; arrays, so it passes through ``jit`` and ``vmap``.

    Attributes:
      iterations: int32, products spent in the loop.
      residual_norm: norm of rhs - (A + damping I) x; the true one where the solve converged and
        rounding could have parted the two, else as the recurrence carries it.
      converged: bool, the residual or the progress test was met; the former not only by the
        recurrence.
      breakdown: bool, a non-finite value or a curvature that is not positive was met.
      model_value: 1/2 x^T (A + damping I) x - rhs^T x.
      curvature: x^T A x, without the damping.
      damping_term: damping x^T x.
    """

    iterations: Array
    residual_norm: Array
    converged: Array
    breakdown: Array
    model_value: Array
    curvature: Array
    damping_term: Array


class _Carry(NamedTuple):
    x: Any
    residual: Any
    z: Any  # M residual; () without M
    direction: Any  # the last one, in the dtypes of rhs
    beta: Array  # how much of it the next one keeps
    rz: Array  # residual . z
    rr: Array  # residual . residual
    pp: Array  # direction . direction
    steepest: Array  # largest curvature p^T A p / p^T p met so far
    iteration: Array
    phi: Array  # quadratic model at x, by its recurrence: b need not be kept for it
    history: Array  # ring buffer of phi
    converged: Array
    breakdown: Array
    checking: Array  # the next product is by x, for the true residual
    checked: Array  # residual . residual of the last such product
    stalled: Array  # it did not fall any more


def cg(
    operator: Any,
    rhs: Any,
    *,
    damping: ArrayLike = 0.0,
    x0: Any = None,
    tol: ArrayLike = 1e-5,
    atol: ArrayLike = 0.0,
    maxiter: Any = None,
    M: Callable[[Any], Any] | None = None,
    progress_tol: ArrayLike = 0.0,
) -> tuple[Any, CGInfo]:
    """Solves (A + damping I) x = rhs for a symmetric positive definite A + damping I.

    Where rounding could have parted the residual of the recurrence from the true one (mostly in
    float32; at ill-conditioned A; at an ``x0`` far off), one product more tells at the end
    whether the tolerance is met. If not, the solve goes on from the true residual, until it
    is, or until a second check finds it hardly smaller: the dtype then holds no better x, and
    ``converged`` is False. ``tol=0`` with ``atol=0`` is never checked.

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
      ``(x, info)``: x in the dtypes of ``rhs``, and a :class:`CGInfo`. On breakdown x is the last
      good iterate, zeros at worst.

    Raises:
      ValueError: for trees that do not fit ``rhs``, or numbers that are negative or not finite.
      TypeError: for leaves that are not floating-point.

    Example:
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
    # A function may read state that changes between calls, so it is never compiled for later calls.
    opaque = any(callable(leaf) for leaf in jax.tree.leaves((operator, M)))
    solve = solve_in_metric if opaque else _solve_compiled
    return solve(
        operator, M, None, rhs, damping, x0, tol, atol, limit, window, progress_tol, verify
    )


def solve_in_metric(
    operator: Any,
    M: Any,
    metric: Any,
    rhs: Any,
    damping: Any,
    x0: Any,
    tol: Any,
    atol: Any,
    limit: Any,
    window: int,
    progress_tol: Any,
    verify: bool = False,
) -> tuple[Any, CGInfo]:
    """The solve of :func:`cg`, of A + damping D for the diagonal D = ``metric``; None is I.

    Conjugate gradients for y = D^(1/2) x, in (D^(-1/2) A D^(-1/2) + damping I) y = D^(-1/2) rhs:
    the same as preconditioning with D, at an inner product less per iteration. The iterate and the
    direction are kept as x = D^(-1/2) y, which A multiplies; the residual, the norms and M are
    those of y. ``window`` is the longest look back of the progress test, or 0. ``verify`` says
    whether convergence is checked by the true residual, which keeps the right-hand side as well.
    """
    precondition = getattr(M, "mv", M)
    dtype = jnp.float32
    if any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(rhs)):
        dtype = jnp.float64
    damping, tol, atol = (jnp.asarray(value, dtype) for value in (damping, tol, atol))
    progress_tol = jnp.asarray(progress_tol, dtype)
    rounded = any(leaf.dtype != wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(rhs))
    # Of the dtypes that x and the products are rounded to.
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs)), default=0.0)
    to_y, to_x = _roots(metric)

    def dot(a: Any, b: Any) -> Array:
        return tree_vdot(a, b).astype(dtype)

    def multiply(v: Any) -> tuple[Any, Array]:
        """A v, and v^T A v."""
        if hasattr(operator, "mv_and_form"):
            product, form = operator.mv_and_form(v)
            return widen_tree(product), form.astype(dtype)
        product = getattr(operator, "mv", operator)(v)
        product = widen_tree(check_like(product, rhs, "operator(v)", "rhs"))
        return product, dot(v, product)

    def apply_inverse(r: Any) -> Any:
        return r if M is None else widen_tree(check_like(precondition(r), r, "M(v)", "rhs"))

    b = to_x(widen_tree(rhs))
    scale = power_of_two(tree_norm(b).astype(dtype))
    b = jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), b)
    bb = dot(b, b)
    threshold = jnp.maximum(tol * jnp.sqrt(bb), atol / scale).astype(dtype)

    def start() -> tuple[Any, Any, Array]:
        zeros = tree_zeros_like(b)
        if x0 is None:
            return zeros, b, bb
        x = jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), widen_tree(x0))
        x = widen_tree(cast_like(x, rhs))
        product = tree_axpy(damping, to_y(x), to_x(multiply(cast_like(x, rhs))[0]))
        residual = tree_axpy(-1, product, b)
        rr = dot(residual, residual)
        usable = jnp.isfinite(rr) & (bb > 0)
        return tree_where(usable, (x, residual, rr), (zeros, b, bb))

    def may_have_drifted(x: Any, iteration: Array, steepest: Array) -> Array:
        """Whether the true residual may be beyond the threshold that the recurrence met."""
        size = jnp.maximum(jnp.sqrt(dot(to_y(x), to_y(x))), start_norm)
        return 16 * eps * iteration.astype(dtype) * steepest * size > threshold

    def body(c: _Carry) -> _Carry:
        # The direction comes first, so that the last one is dead and XLA overwrites it in place.
        z = to_x(c.residual if M is None else c.z)
        stored = cast_like(tree_axpy(c.beta, widen_tree(c.direction), z), rhs)
        if verify:
            # A check multiplies x in place of a direction: the operator is compiled once.
            stored = tree_where(c.checking, cast_like(c.x, rhs), stored)
        direction, (product, form) = widen_tree(stored), multiply(stored)
        # The residual is orthogonal to the last direction, unless that was rounded.
        carried = M is None and not rounded
        scaled = to_y(direction)
        pp = c.rr + c.beta * c.beta * c.pp if carried else dot(scaled, scaled)
        # The damping never enters a vector of its own: a pass over memory less.
        pap = form + damping * pp
        slope = dot(scaled, c.residual) if rounded else c.rz
        steepest = jnp.maximum(c.steepest, pap / pp)
        alpha = slope / pap
        # Below this the curvature is rounding: dividing by it would throw x along a null direction.
        flat = pap <= 4 * jnp.finfo(dtype).eps * steepest * pp
        good = ~flat & jnp.isfinite(alpha)
        applied = lambda: tree_axpy(damping, scaled, to_x(product))
        moved = lambda: tree_where(good, tree_axpy(-alpha, applied(), c.residual), c.residual)
        residual = otherwise(c, lambda: tree_axpy(-1, applied(), b), moved)
        rr = dot(residual, residual)
        good = otherwise(c, lambda: jnp.array(True), lambda: good) & jnp.isfinite(rr)

        z = apply_inverse(residual)
        rz = rr if M is None else dot(residual, z)
        reached = good & (jnp.sqrt(rr) <= threshold)
        usable = jnp.isfinite(rz) & (rz > 0)  # else M is not positive definite

        iteration = c.iteration + jnp.where(c.checking, 0, 1)
        steepest = jnp.where(c.checking, c.steepest, steepest)
        x = otherwise(c, lambda: direction, lambda: tree_axpy(alpha, direction, c.x))
        x = tree_where(good, x, c.x)
        phi = otherwise(
            c,
            lambda: -0.5 * dot(scaled, tree_axpy(1, b, residual)),
            lambda: c.phi - 0.5 * alpha * slope,
        )
        checking = jnp.array(False)
        if verify:
            drifted = lambda: may_have_drifted(x, iteration, steepest)
            checking = jax.lax.cond(reached & ~c.checking, drifted, lambda: checking)
        converged, history = reached & ~checking, c.history
        if window:
            k = jnp.clip((iteration + 9) // 10, 10, window)
            before = history[(iteration - k) % (window + 1)]
            small = (phi - before) / phi < k.astype(dtype) * progress_tol
            small &= ~c.checking
            converged |= good & (iteration > k) & (phi < 0) & small
            history = history.at[iteration % (window + 1)].set(phi)
        return _Carry(
            x=x,
            residual=residual,
            z=() if M is None else z,
            direction=stored,
            beta=jnp.where(c.checking, 0, rz / c.rz),
            rz=rz,
            rr=jnp.where(good, rr, c.rr),
            pp=jnp.where(c.checking, 0, pp),
            steepest=steepest,
            iteration=iteration,
            phi=jnp.where(good, phi, c.phi),
            history=history,
            converged=converged,
            breakdown=~good | (~reached & ~usable),
            checking=checking & ~converged,
            checked=jnp.where(c.checking, rr, c.checked),
            stalled=c.checking & ~(rr <= 0.25 * c.checked),
        )

    def otherwise(c: _Carry, checked: Callable[[], Any], moved: Callable[[], Any]) -> Any:
        """``checked()`` after the product of a check, else ``moved()``."""
        return jax.lax.cond(c.checking, checked, moved) if verify else moved()

    def unfinished(c: _Carry) -> Array:
        going = ~c.converged & ~c.breakdown & ~c.stalled
        return going & (c.checking | (c.iteration < limit))

    x, residual, rr = start()
    start_norm = jnp.zeros((), dtype)
    if verify and x0 is not None:
        start_norm = jnp.sqrt(dot(to_y(x), to_y(x)))
    z = apply_inverse(residual)
    rz = rr if M is None else dot(residual, z)
    phi = jnp.zeros((), dtype)
    if x0 is not None:
        phi = -0.5 * dot(to_y(x), tree_axpy(1, b, residual))
    converged = jnp.isfinite(rr) & (jnp.sqrt(rr) <= threshold)
    last = jax.lax.while_loop(
        unfinished,
        body,
        _Carry(
            x=x,
            residual=residual,
            z=() if M is None else z,
            direction=tree_zeros_like(rhs),
            beta=jnp.zeros((), dtype),
            rz=rz,
            rr=rr,
            pp=jnp.zeros((), dtype),
            steepest=jnp.zeros((), dtype),
            iteration=jnp.zeros((), jnp.int32),
            phi=phi,
            history=jnp.full((window + 1,), phi),
            converged=converged,
            breakdown=~converged & ~(jnp.isfinite(rz) & (rz > 0)),
            checking=jnp.zeros((), jnp.bool_),
            checked=jnp.full((), jnp.inf, dtype),
            stalled=jnp.zeros((), jnp.bool_),
        ),
    )
    # y^T (...) y is -2 phi - 2 y^T r, since (...) y = b - r: without a product.
    y = to_y(last.x)
    yr, damping_term = dot(y, last.residual), damping * dot(y, y)
    yr = jnp.where(jnp.isfinite(yr), yr, 0)  # a residual that overflowed ended the solve
    x = jax.tree.map(lambda leaf: (leaf * scale).astype(leaf.dtype), last.x)
    x = cast_like(x, rhs)
    representable = tree_is_finite(x)
    info = CGInfo(
        iterations=last.iteration,
        residual_norm=jnp.sqrt(last.rr) * scale,
        converged=last.converged & representable,
        breakdown=last.breakdown | ~representable,
        model_value=last.phi * scale * scale,
        curvature=(-2 * (last.phi + yr) - damping_term) * scale * scale,
        damping_term=damping_term * scale * scale,
    )
    return tree_where(representable, x, tree_zeros_like(x)), info


_solve_compiled = compiled_when_eager(solve_in_metric)


def _roots(metric: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Multiplication by D^(1/2), from x to y, and by D^(-1/2), from y to x."""
    if metric is None:
        return lambda x: x, lambda y: y
    root = jax.tree.map(jax.lax.rsqrt, metric)
    over = lambda x, n: (x / n.astype(x.dtype)).astype(x.dtype)
    times = lambda y, n: (y * n.astype(y.dtype)).astype(y.dtype)
    return (lambda x: jax.tree.map(over, x, root)), (lambda y: jax.tree.map(times, y, root))


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
