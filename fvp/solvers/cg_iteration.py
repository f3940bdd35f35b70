"""The iteration of `fvp.cg`; what differs from the textbook is said there, and why."""

from __future__ import annotations

import dataclasses
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
      tol, atol, progress_tol: as in `fvp.cg`.
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
    direction: Any  # the last one, in the dtypes of rhs; or the guess where it is ``starting``
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
    starting: Array  # the next product is by a guess, for its true residual
    guessed: Array  # norm of the first guess
    checked: Array  # residual . residual where a solve was started again; inf before
    stalled: Array  # it did not fall any more


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

    A guess is the first direction, taken at full length from zeros. So it is where a solve that may
    have converged is checked: it starts again from its x, and the operator is compiled once.
    """
    iteration = _Iteration.of(system, rhs)
    first = iteration.first(x0)
    return iteration.finish(jax.lax.while_loop(iteration.unfinished, iteration.step, first))


solve_compiled = compiled_when_eager(solve)


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """Lives inside one trace. Vectors are those of the scaled system, rhs / scale."""

    system: LinearSystem
    rhs: Params
    root: PyTree  # D^(-1/2), or None
    b: Params  # D^(-1/2) rhs / scale
    bb: Array
    scale: Array  # a power of two
    threshold: Array  # of the residual norm
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
        root = None
        if system.diagonal is not None:
            root = computed_once(jax.tree.map(jax.lax.rsqrt, system.diagonal))
        b = _to_x(widen_tree(rhs), root)
        scale = power_of_two(tree_norm(b).astype(dtype))
        b = _divided(b, scale)
        bb = tree_vdot(b, b).astype(dtype)
        threshold = jnp.maximum(tol * jnp.sqrt(bb), atol / scale).astype(dtype)
        return cls(system, rhs, root, b, bb, scale, threshold, dtype)

    # The iteration.

    def first(self, x0: Params | None) -> _Carry:
        """Before the first product: at zeros, where the model is 0."""
        guess, z = tree_zeros_like(self.rhs), self._precondition(self.b) if x0 is None else self.b
        if x0 is not None:
            finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), widen_tree(x0))
            guess = cast_like(_divided(finite, self.scale), self.rhs)
        rz = self.bb if self.system.M is None or x0 is not None else self._dot(self.b, z)
        converged = jnp.isfinite(self.bb) & (jnp.sqrt(self.bb) <= self.threshold)
        return _Carry(
            x=tree_zeros_like(self.b),
            residual=self.b,
            z=() if self.system.M is None else z,
            direction=guess,
            beta=self._number(x0 is not None),
            rz=rz,
            rr=self.bb,
            pp=self._number(0),
            steepest=self._number(0),
            iteration=jnp.zeros((), jnp.int32),
            phi=self._number(0),
            history=jnp.zeros((self.system.window + 1,), self.dtype),
            converged=converged,
            breakdown=~converged & ~(jnp.isfinite(rz) & (rz > 0)),
            starting=jnp.array(x0 is not None),
            guessed=self._number(0),
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
        return going & (c.starting | (c.iteration < self.system.limit))

    def step(self, c: _Carry) -> _Carry:
        """One product: along the next direction, or by a guess."""
        # The direction comes first, so that the last one is dead and XLA overwrites it in place.
        z = tree_scale(~c.starting, self._to_x(c.residual if self.system.M is None else c.z))
        stored = cast_like(tree_axpy(c.beta, widen_tree(c.direction), z), self.rhs)
        move = self._moved(c, stored)
        z = self._precondition(move.residual)
        rz = move.rr if self.system.M is None else self._dot(move.residual, z)
        reached = move.good & (jnp.sqrt(move.rr) <= self.threshold)
        usable = jnp.isfinite(rz) & (rz > 0)  # else M is not positive definite
        first = c.starting & (c.iteration == 0)
        iteration = c.iteration + jnp.where(c.starting, 0, 1)
        progress, history = self._progress(c, move, iteration)
        following = _Carry(
            x=tree_where(move.good, move.x, c.x),
            residual=move.residual,
            z=() if self.system.M is None else z,
            direction=stored,
            beta=jnp.where(c.starting, 0, rz / c.rz),
            rz=rz,
            rr=jnp.where(move.good, move.rr, c.rr),
            pp=jnp.where(c.starting, 0, move.pp),
            steepest=move.steepest,
            iteration=iteration,
            phi=jnp.where(move.good, move.phi, c.phi),
            history=history,
            converged=reached | progress,
            # A guess of no use is left at zeros.
            breakdown=(~move.good & ~first) | (~reached & ~usable),
            starting=jnp.zeros((), jnp.bool_),
            guessed=jnp.where(first, jnp.sqrt(move.pp), c.guessed),
            checked=jnp.where(c.starting & ~first, move.rr, c.checked),
            stalled=c.starting & ~(move.rr <= 0.25 * c.checked),
        )
        must_hold = reached & ~progress & ~c.starting
        return self._checked(following, must_hold) if self.system.verify else following

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
        """The step along ``stored``: to the minimum, or to its end where it is a guess."""
        direction, (product, form) = widen_tree(stored), self._multiply(stored)
        rounded = self._is_rounded()
        scaled = self._to_y(direction)
        products = lambda: (self._dot(scaled, scaled), self._dot(scaled, c.residual))

        def recurrences() -> tuple[Array, Array]:
            if self.system.M is not None:
                return self._dot(scaled, scaled), c.rz
            return c.rr + c.beta * c.beta * c.pp, c.rz

        # The residual is orthogonal to the last direction, unless that was rounded.
        by_recurrence = jnp.array(False) if rounded else ~c.starting
        pp, slope = jax.lax.cond(by_recurrence, recurrences, products)
        # The damping never enters a vector of its own: a pass over memory less.
        pap = form + self.system.damping * pp
        steepest = jnp.maximum(c.steepest, pap / pp)
        alpha = jnp.where(c.starting, 1, slope / pap)
        # Below this the curvature is rounding: dividing by it would throw x along a null direction.
        flat = pap <= 4 * jnp.finfo(self.dtype).eps * steepest * pp
        good = (c.starting | ~flat) & jnp.isfinite(alpha) & jnp.isfinite(pap)
        applied = tree_axpy(self.system.damping, scaled, self._to_x(product))
        residual = tree_where(good, tree_axpy(-alpha, applied, c.residual), c.residual)
        rr = self._dot(residual, residual)
        # From zeros a guess goes, also where x is the guess.
        x = tree_scale(~c.starting, c.x) if self.system.verify else c.x
        return _Move(
            x=tree_axpy(alpha, direction, x),
            residual=residual,
            rr=rr,
            phi=jnp.where(c.starting, 0, c.phi) - alpha * (slope - 0.5 * alpha * pap),
            pp=pp,
            steepest=jnp.where(c.starting, c.steepest, steepest),
            good=good & jnp.isfinite(rr),
        )

    def _checked(self, c: _Carry, reached: Array) -> _Carry:
        """Starts again where the threshold was ``reached``, but rounding may have met it."""
        # Of the dtypes that x and the products are rounded to.
        eps = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(self.rhs)]

        def drifted() -> Array:
            size = jnp.maximum(self.norm(c.x), c.guessed)
            bound = 16 * max(eps, default=0.0) * c.iteration.astype(self.dtype) * c.steepest * size
            return bound > self.threshold

        again = jax.lax.cond(reached, drifted, lambda: jnp.array(False))
        return c._replace(
            residual=tree_where(again, self.b, c.residual),
            direction=tree_where(again, cast_like(c.x, self.rhs), c.direction),
            beta=jnp.where(again, 1, c.beta),
            converged=c.converged & ~again,
            starting=again,
        )

    def _progress(self, c: _Carry, move: _Move, iteration: Array) -> tuple[Array, Array]:
        """Whether the quadratic model has stopped falling, and its history."""
        window = self.system.window
        if not window:
            return jnp.array(False), c.history
        k = jnp.clip((iteration + 9) // 10, 10, window)
        before = c.history[(iteration - k) % (window + 1)]
        phi = move.phi
        small = (phi - before) / phi < k.astype(self.dtype) * self.system.progress_tol
        small &= ~c.starting
        ended = move.good & (iteration > k) & (phi < 0) & small
        return ended, c.history.at[iteration % (window + 1)].set(phi)

    def _multiply(self, v: Params) -> tuple[Params, Array]:
        """A v, and v^T A v."""
        product, form = product_and_form(self.system.operator, v, self.rhs)
        return product, form.astype(self.dtype)

    def _precondition(self, r: Params) -> Params:
        """M r."""
        return r if self.system.M is None else precondition(self.system.M, r)

    def _is_rounded(self) -> bool:
        """Whether directions are narrower than the vectors of the iteration."""
        return any(leaf.dtype != wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(self.rhs))

    def _dot(self, a: Params, b: Params) -> Array:
        return tree_vdot(a, b).astype(self.dtype)

    def _number(self, x: Any) -> Array:
        return jnp.full((), x, self.dtype)

    def _to_y(self, x: Params) -> Params:
        if self.root is None:
            return x
        return jax.tree.map(lambda x, r: (x / r.astype(x.dtype)).astype(x.dtype), x, self.root)

    def _to_x(self, y: Params) -> Params:
        return _to_x(y, self.root)


def product_and_form(operator: Any, v: Params, rhs: Params) -> tuple[Params, Array]:
    """A v in float32 or wider, and v^T A v, for ``v`` like the right-hand side."""
    if hasattr(operator, "mv_and_form"):
        product, form = operator.mv_and_form(v)
        return widen_tree(product), form
    product = getattr(operator, "mv", operator)(v)
    product = widen_tree(check_like(product, rhs, "operator(v)", "rhs"))
    return product, tree_vdot(v, product)


def precondition(inverse: Any, r: Params) -> Params:
    """M r in float32 or wider."""
    return widen_tree(check_like(getattr(inverse, "mv", inverse)(r), r, "M(v)", "rhs"))


def _to_x(y: Params, root: PyTree) -> Params:
    """D^(-1/2) y."""
    if root is None:
        return y
    return jax.tree.map(lambda y, r: (y * r.astype(y.dtype)).astype(y.dtype), y, root)


def _divided(tree: Params, scale: Array) -> Params:
    scale = computed_once(scale)
    return jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), tree)
