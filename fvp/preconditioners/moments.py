"""Moments of the gradient, kept in the eigenbases of its averaged outer products."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from fvp.layers.products import einsum
from fvp.numerics import cast_like, computed_once, tree_vdot, wide_dtype, widen
from fvp.tracing.steps import Shape
from fvp.typing import Params

# docs/decisions/steps.md
_MEAN, _SQUARES, _OUTER = 0.9, 0.95, 0.99  # memories of the averages
_PERIOD = 10  # steps between two refreshments of the bases
_LARGEST = 1024  # axes that are longer keep their own coordinates
_PER_COLUMN = 20  # as do those of so many entries or more for each column of the gradient
_FLOOR = 2.0**-32  # least square over the largest of its leaf
_KEPT = 2.0**-16  # of the trace: where outer products are smaller, the basis stays as it is


class Moments(NamedTuple):
    """State of the preconditioner; trees like the parameters, in float32 or wider.

    For each axis of a leaf with two or more a basis: eigenvectors of the averaged outer products of
    the gradient along it. Both moments and the direction are in these coordinates.
    """

    gradients: Array  # int32 scalar, their number
    first_moment: Any  # running average from 0 of the gradients
    second_moment: Any  # running average from 0 of their squares
    turned: Any  # the direction: the first moment over the root of the second
    outer: Any  # for each leaf and axis the decaying sum (d, d) of the outer products
    bases: Any  # for each leaf and axis (d, d), the eigenvectors in columns

    @classmethod
    def of(cls, params: Params) -> Moments:
        """Before the first gradient."""
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p.dtype)), params)
        leaves = jax.tree.leaves(params)

        def square(make: Callable[[int, DTypeLike], Array]) -> Any:
            # ``optax.tree.map_params`` makes the state of parameters without leaves, where one leaf
            # has to stand for the matrices of all.
            sizes = lambda p: [p.shape[axis] for axis in turned_axes(p.shape)]
            dtype = lambda p: wide_dtype(p.dtype)
            found = tuple(tuple(make(size, dtype(p)) for size in sizes(p)) for p in leaves)
            return found if leaves else jnp.zeros(())

        return cls(
            gradients=jnp.zeros((), jnp.int32),
            first_moment=zeros(),
            second_moment=zeros(),
            turned=zeros(),
            outer=square(lambda size, dtype: jnp.zeros((size, size), dtype)),
            bases=square(lambda size, dtype: jnp.eye(size, dtype=dtype)),
        )

    def updated(self, gradient: Params) -> tuple[Moments, Array, Array]:
        """With one more gradient, and every ten steps with new bases.

        Also the slope of the gradient along the last direction, and that of the gradient over the
        root of the second moment.
        """
        leaves, structure = jax.tree.flatten(gradient)
        if not leaves:
            return self, jnp.zeros(()), jnp.zeros(())
        leaves = [widen(leaf) for leaf in leaves]
        outer = tuple(
            tuple(_OUTER * total + _outer_product(g, axis) for total, axis in _axes(totals, g))
            for totals, g in zip(self.outer, leaves, strict=True)
        )
        trees = (self.first_moment, self.second_moment, self.turned)
        flat = (self.bases, *map(jax.tree.leaves, trees))
        bases, first, second, last = jax.lax.cond(
            self.gradients % _PERIOD == 0,
            lambda flat: _refreshed(outer, *flat),
            lambda flat: flat,
            flat,
        )
        now = [_turned(g, basis) for g, basis in zip(leaves, bases, strict=True)]
        add = lambda old, new, memory: memory * old + (1 - memory) * new
        first = [add(m, g, _MEAN) for m, g in zip(first, now, strict=True)]
        second = [add(s, jnp.square(g), _SQUARES) for s, g in zip(second, now, strict=True)]
        weight = lambda memory: 1 - memory ** (self.gradients + 1.0)
        root = jnp.sqrt(weight(_SQUARES))
        per_gradient, per_mean = computed_once((root, root / weight(_MEAN)))
        roots = [_root(s, basis) for s, basis in zip(second, bases, strict=True)]
        ratio = lambda x, root: jnp.where(root > 0, x / jnp.where(root > 0, root, 1), 0)
        turned = [ratio(per_mean * m, root) for m, root in zip(first, roots, strict=True)]
        whitened = [ratio(per_gradient * g, root) for g, root in zip(now, roots, strict=True)]
        tree = lambda flat: jax.tree.unflatten(structure, flat)
        state = Moments(self.gradients + 1, tree(first), tree(second), tree(turned), outer, bases)
        return state, tree_vdot(now, last), tree_vdot(whitened, last)

    def direction(self, like: Params) -> Params:
        """The direction in the coordinates of the parameters, and in the dtypes of ``like``."""
        leaves, structure = jax.tree.flatten(self.turned)
        if not leaves:
            return like
        back = [_turned(x, basis, back=True) for x, basis in zip(leaves, self.bases, strict=True)]
        return cast_like(jax.tree.unflatten(structure, back), like)


def turned_axes(shape: Shape) -> tuple[int, ...]:
    """The axes that get a basis: those that the columns of some twenty gradients tell."""

    def told(size: int) -> bool:
        columns = math.prod(shape) / size if size else 0
        return size <= _LARGEST and columns > 1 and 1 < size < _PER_COLUMN * columns

    return tuple(axis for axis, size in enumerate(shape) if told(size))


def _axes(matrices: tuple[Array, ...], x: Array) -> Any:
    """The matrices of a leaf, each with its axis."""
    return zip(matrices, turned_axes(x.shape), strict=True)


def _outer_product(x: Array, axis: int) -> Array:
    """X X^T of ``x`` with this axis in front and all others as columns."""
    letters = string.ascii_lowercase[: x.ndim]
    other = letters.replace(letters[axis], "z")
    return einsum(f"{letters},{other}->{letters[axis]}z", x, x)


def _turned(x: Array, bases: tuple[Array, ...], back: bool = False) -> Array:
    """``x`` in the coordinates of the bases, or ``back`` out of them."""
    letters = string.ascii_lowercase[: x.ndim]
    for basis, axis in _axes(bases, x):
        old = letters[axis]
        sides = f"z{old}" if back else f"{old}z"
        x = einsum(f"{letters},{sides}->{letters.replace(old, 'z')}", x, basis)
    return x


def _root(square: Array, bases: tuple[Array, ...]) -> Array:
    """The root of averaged squares; those that turning's rounding may have made are the least."""
    if bases:
        square = jnp.maximum(square, _FLOOR * jnp.max(square, initial=0))
    return jnp.sqrt(square)


def _refreshed(
    outer: Any, bases: Any, first: list[Array], second: list[Array], turned: list[Array]
) -> Any:
    """One step of subspace iteration for each basis, and the rest in the new coordinates.

    Squares go over by the squares of the rotation: exact where coordinates are uncorrelated, and
    with the first moment never larger than their roots allow.
    """
    found: tuple[list[Any], ...] = ([], [], [], [])
    for totals, old, *moments in zip(outer, bases, first, second, turned, strict=True):
        new = ()
        if old:
            trace = jnp.trace(totals[0])  # the squares of all gradients, along whichever axis
            little = computed_once(jnp.where(trace > 0, _KEPT * trace, 1))
            new = tuple(_iterated(*sides, little) for sides in zip(totals, old, strict=True))
            turns = [einsum("ij,ik->jk", a, b) for a, b in zip(old, new, strict=True)]
            turns = tuple(jnp.stack([turn, jnp.square(turn), turn]) for turn in turns)
            moments = jax.vmap(_turned)(jnp.stack(moments), turns)
        for kept, value in zip(found, (new, *moments), strict=True):
            kept.append(value)
    return tuple(found[0]), *found[1:]


def _iterated(total: Array, basis: Array, little: Array) -> Array:
    """The orthonormal factor of (total + a little) basis.

    Without that little, rounding would choose the basis where there has been no gradient.
    """
    return jnp.linalg.qr(einsum("ij,jk->ik", total, basis) + little * basis)[0]
