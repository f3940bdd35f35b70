"""The iteration of :func:`fvp.cg`; what differs from the textbook is said there, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_like
from fvp.compilation import compiled_when_eager
from fvp.numerics import (
    cast_like,
    computed_once,
    power_of_two,
    tree_axpy,
    tree_is_finite,
    tree_norm,
    tree_scale,
    tree_vdot,
    tree_where,
    tree_zeros_like,
    wide_dtype,
    widen_tree,
)
from fvp.typing import Params, PyTree


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


class LinearSystem(NamedTuple):
    """A + damping D, and when the iteration stops; a pytree.

    Attributes:
      operator: a curvature operator, or any linear callable v -> A v.
      damping: number or scalar array.
      diagonal: D, a tree of positive entries like the right-hand side; None is the identity.
      M: approximates the inverse of D^(-1/2) A D^(-1/2) + damping I; or None.
      tol, atol, progress_tol: as in :func:`fvp.cg`.
      limit: most iterations.
      window: the longest look back of the progress test; 0 for none.
      verify: whether convergence is checked by the true residual, which keeps the right-hand side.
    """

    operator: Any
    damping: ArrayLike
    diagonal: PyTree = None
    M: Any = None
    tol: ArrayLike = 1e-5
    atol: ArrayLike = 0.0
    progress_tol: ArrayLike = 0.0
    limit: Any = 0
    window: int = 0
    verify: bool = False


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


class _Start(NamedTuple):
    x: Any
    residual: Any
    rr: Array


class _Move(NamedTuple):
    """One product, and where it leads."""

    x: Any
    residual: Any
    rr: Array
    phi: Array
    pp: Array
    steepest: Array
    good: Array  # bool: the curvature is positive, and everything finite


def solve(system: LinearSystem, rhs: Params, x0: Params | None) -> tuple[Params, CGInfo]:
    """Conjugate gradients for y = D^(1/2) x.

    In (D^(-1/2) A D^(-1/2) + damping I) y = D^(-1/2) rhs: the same as preconditioning with D, at an
    inner product less per iteration. The iterate and the direction are kept as x = D^(-1/2) y,
    which A multiplies; the residual, the norms and M are those of y.
    """
    iteration = _Iteration.of(system, rhs)
    start = iteration.start(x0)
    if system.verify and x0 is not None:
        iteration = dataclasses.replace(iteration, start_norm=iteration.norm(start.x))
    first = iteration.first(start, from_zeros=x0 is None)
    return iteration.finish(jax.lax.while_loop(iteration.unfinished, iteration.step, first))


solve_compiled = compiled_when_eager(solve)


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """Lives inside one trace. Vectors are those of the scaled system, rhs / scale."""

    system: LinearSystem
    rhs: Params
    b: Params  # D^(-1/2) rhs / scale
    bb: Array
    scale: Array  # a power of two
    threshold: Array  # of the residual norm
    start_norm: Array  # of the guess that a check is to trust; 0 without
    dtype: Any  # of the scalars

    @classmethod
    def of(cls, system: LinearSystem, rhs: Params) -> Self:
        """Scales the right-hand side."""
        wide = [leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(rhs)]
        dtype = jnp.float64 if any(wide) else jnp.float32
        number = lambda x: jnp.asarray(x, dtype)
        damping, tol, atol = number(system.damping), number(system.tol), number(system.atol)
        progress_tol = number(system.progress_tol)
        system = system._replace(damping=damping, tol=tol, atol=atol, progress_tol=progress_tol)
        b = _times_root(widen_tree(rhs), system.diagonal, -1)
        scale = power_of_two(tree_norm(b).astype(dtype))
        b = _divided(b, scale)
        bb = tree_vdot(b, b).astype(dtype)
        threshold = jnp.maximum(tol * jnp.sqrt(bb), atol / scale).astype(dtype)
        return cls(system, rhs, b, bb, scale, threshold, number(0), dtype)

    # The iteration.

    def start(self, x0: Params | None) -> _Start:
        """From the guess of the caller; from zeros where there is none, or it is of no use."""
        zeros = tree_zeros_like(self.b)
        if x0 is None:
            return _Start(zeros, self.b, self.bb)
        x = widen_tree(cast_like(_divided(widen_tree(x0), self.scale), self.rhs))
        product = self._to_x(self._multiply(cast_like(x, self.rhs))[0])
        product = tree_axpy(self.system.damping, self._to_y(x), product)
        residual = tree_axpy(-1, product, self.b)
        rr = self._dot(residual, residual)
        usable = jnp.isfinite(rr) & (self.bb > 0)
        return tree_where(usable, _Start(x, residual, rr), _Start(zeros, self.b, self.bb))

    def first(self, start: _Start, *, from_zeros: bool) -> _Carry:
        """Before the first product of the loop; the model is 0 at zeros."""
        x, residual, rr = start
        z = self._precondition(residual)
        rz = rr if self.system.M is None else self._dot(residual, z)
        phi = self._number(0)
        if not from_zeros:
            phi = -0.5 * self._dot(self._to_y(x), tree_axpy(1, self.b, residual))
        converged = jnp.isfinite(rr) & (jnp.sqrt(rr) <= self.threshold)
        return _Carry(
            x=x,
            residual=residual,
            z=() if self.system.M is None else z,
            direction=tree_zeros_like(self.rhs),
            beta=self._number(0),
            rz=rz,
            rr=rr,
            pp=self._number(0),
            steepest=self._number(0),
            iteration=jnp.zeros((), jnp.int32),
            phi=phi,
            history=jnp.full((self.system.window + 1,), phi),
            converged=converged,
            breakdown=~converged & ~(jnp.isfinite(rz) & (rz > 0)),
            checking=jnp.zeros((), jnp.bool_),
            checked=self._number(jnp.inf),
            stalled=jnp.zeros((), jnp.bool_),
        )

    def norm(self, x: Params) -> Array:
        """The norm of y = D^(1/2) x."""
        y = self._to_y(x)
        return jnp.sqrt(self._dot(y, y))

    def unfinished(self, c: _Carry) -> Array:
        """Whether there is another product to make."""
        going = ~c.converged & ~c.breakdown & ~c.stalled
        return going & (c.checking | (c.iteration < self.system.limit))

    def step(self, c: _Carry) -> _Carry:
        """One product: along the next direction, or by x to check its residual."""
        # The direction comes first, so that the last one is dead and XLA overwrites it in place.
        z = self._to_x(c.residual if self.system.M is None else c.z)
        stored = cast_like(tree_axpy(c.beta, widen_tree(c.direction), z), self.rhs)
        if self.system.verify:
            # A check multiplies x in place of a direction: the operator is compiled once.
            stored = tree_where(c.checking, cast_like(c.x, self.rhs), stored)
        move = self._moved(c, stored)
        z = self._precondition(move.residual)
        rz = move.rr if self.system.M is None else self._dot(move.residual, z)
        reached = move.good & (jnp.sqrt(move.rr) <= self.threshold)
        usable = jnp.isfinite(rz) & (rz > 0)  # else M is not positive definite
        iteration = c.iteration + jnp.where(c.checking, 0, 1)
        x = tree_where(move.good, move.x, c.x)
        checking = self._must_check(reached & ~c.checking, x, iteration, move.steepest)
        converged = reached & ~checking
        progress, history = self._progress(c, move, iteration)
        converged |= progress
        return _Carry(
            x=x,
            residual=move.residual,
            z=() if self.system.M is None else z,
            direction=stored,
            beta=jnp.where(c.checking, 0, rz / c.rz),
            rz=rz,
            rr=jnp.where(move.good, move.rr, c.rr),
            pp=jnp.where(c.checking, 0, move.pp),
            steepest=move.steepest,
            iteration=iteration,
            phi=jnp.where(move.good, move.phi, c.phi),
            history=history,
            converged=converged,
            breakdown=~move.good | (~reached & ~usable),
            checking=checking & ~converged,
            checked=jnp.where(c.checking, move.rr, c.checked),
            stalled=c.checking & ~(move.rr <= 0.25 * c.checked),
        )

    def finish(self, last: _Carry) -> tuple[Params, CGInfo]:
        """The solution of the unscaled system and its record."""
        # y^T (...) y is -2 phi - 2 y^T r, since (...) y = b - r: without a product.
        y = self._to_y(last.x)
        squared = lambda x: x * self.scale * self.scale  # of which the square may overflow
        yr = self._dot(y, last.residual)
        damping_term = jnp.asarray(self.system.damping) * self._dot(y, y)
        yr = jnp.where(jnp.isfinite(yr), yr, 0)  # a residual that overflowed ended the solve
        x = cast_like(tree_scale(self.scale, last.x), self.rhs)
        representable = tree_is_finite(x)
        info = CGInfo(
            iterations=last.iteration,
            residual_norm=jnp.sqrt(last.rr) * self.scale,
            converged=last.converged & representable,
            breakdown=last.breakdown | ~representable,
            model_value=squared(last.phi),
            curvature=squared(-2 * (last.phi + yr) - damping_term),
            damping_term=squared(damping_term),
        )
        return tree_where(representable, x, tree_zeros_like(x)), info

    # Its parts.

    def _moved(self, c: _Carry, stored: Params) -> _Move:
        """The step along ``stored``; after the product of a check, x with its true residual."""
        direction, (product, form) = widen_tree(stored), self._multiply(stored)
        rounded = self._is_rounded()
        # The residual is orthogonal to the last direction, unless that was rounded.
        carried = self.system.M is None and not rounded
        scaled = self._to_y(direction)
        pp = c.rr + c.beta * c.beta * c.pp if carried else self._dot(scaled, scaled)
        # The damping never enters a vector of its own: a pass over memory less.
        pap = form + self.system.damping * pp
        slope = self._dot(scaled, c.residual) if rounded else c.rz
        steepest = jnp.maximum(c.steepest, pap / pp)
        alpha = slope / pap
        # Below this the curvature is rounding: dividing by it would throw x along a null direction.
        flat = pap <= 4 * jnp.finfo(self.dtype).eps * steepest * pp
        good = ~flat & jnp.isfinite(alpha)
        applied = lambda: tree_axpy(self.system.damping, scaled, self._to_x(product))
        moved = lambda: tree_where(good, tree_axpy(-alpha, applied(), c.residual), c.residual)
        residual = self._either(c, lambda: tree_axpy(-1, applied(), self.b), moved)
        rr = self._dot(residual, residual)
        good = self._either(c, lambda: jnp.array(True), lambda: good) & jnp.isfinite(rr)
        x = self._either(c, lambda: direction, lambda: tree_axpy(alpha, direction, c.x))
        phi = self._either(
            c,
            lambda: -0.5 * self._dot(scaled, tree_axpy(1, self.b, residual)),
            lambda: c.phi - 0.5 * alpha * slope,
        )
        steepest = jnp.where(c.checking, c.steepest, steepest)
        return _Move(x, residual, rr, phi, pp, steepest, good)

    def _must_check(self, reached: Array, x: Params, iteration: Array, steepest: Array) -> Array:
        """Whether the true residual may be beyond the threshold that the recurrence met."""
        if not self.system.verify:
            return jnp.array(False)
        # Of the dtypes that x and the products are rounded to.
        eps = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(self.rhs)]

        def drifted() -> Array:
            size = jnp.maximum(self.norm(x), self.start_norm)
            bound = 16 * max(eps, default=0.0) * iteration.astype(self.dtype) * steepest * size
            return bound > self.threshold

        return jax.lax.cond(reached, drifted, lambda: jnp.array(False))

    def _progress(self, c: _Carry, move: _Move, iteration: Array) -> tuple[Array, Array]:
        """Whether the quadratic model has stopped falling, and its history."""
        window = self.system.window
        if not window:
            return jnp.array(False), c.history
        k = jnp.clip((iteration + 9) // 10, 10, window)
        before = c.history[(iteration - k) % (window + 1)]
        phi = move.phi
        small = (phi - before) / phi < k.astype(self.dtype) * self.system.progress_tol
        small &= ~c.checking
        ended = move.good & (iteration > k) & (phi < 0) & small
        return ended, c.history.at[iteration % (window + 1)].set(phi)

    def _either(self, c: _Carry, checked: Callable[[], Any], moved: Callable[[], Any]) -> Any:
        """``checked()`` after the product of a check, else ``moved()``."""
        return jax.lax.cond(c.checking, checked, moved) if self.system.verify else moved()

    def _multiply(self, v: Params) -> tuple[Params, Array]:
        """A v, and v^T A v."""
        operator = self.system.operator
        if hasattr(operator, "mv_and_form"):
            product, form = operator.mv_and_form(v)
            return widen_tree(product), form.astype(self.dtype)
        product = getattr(operator, "mv", operator)(v)
        product = widen_tree(check_like(product, self.rhs, "operator(v)", "rhs"))
        return product, self._dot(v, product)

    def _precondition(self, r: Params) -> Params:
        """M r."""
        if self.system.M is None:
            return r
        inverse = getattr(self.system.M, "mv", self.system.M)
        return widen_tree(check_like(inverse(r), r, "M(v)", "rhs"))

    def _is_rounded(self) -> bool:
        """Whether directions are narrower than the vectors of the iteration."""
        return any(leaf.dtype != wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(self.rhs))

    def _dot(self, a: Params, b: Params) -> Array:
        return tree_vdot(a, b).astype(self.dtype)

    def _number(self, x: Any) -> Array:
        return jnp.full((), x, self.dtype)

    def _to_y(self, x: Params) -> Params:
        return _times_root(x, self.system.diagonal, 1)

    def _to_x(self, y: Params) -> Params:
        return _times_root(y, self.system.diagonal, -1)


def _times_root(v: Params, diagonal: PyTree, sign: int) -> Params:
    """D^(1/2) v, or D^(-1/2) v for a negative sign; None is the identity."""
    if diagonal is None:
        return v
    root = jax.tree.map(jax.lax.rsqrt, diagonal)
    if sign > 0:
        return jax.tree.map(lambda x, n: (x / n.astype(x.dtype)).astype(x.dtype), v, root)
    return jax.tree.map(lambda y, n: (y * n.astype(y.dtype)).astype(y.dtype), v, root)


def _divided(tree: Params, scale: Array) -> Params:
    scale = computed_once(scale)
    return jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), tree)
