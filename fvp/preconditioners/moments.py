"""Gradients whitened in the eigenbases of their averaged outer products."""

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
from fvp.numerics import computed_once, wide_dtype, widen
from fvp.tracing.steps import Shape
from fvp.typing import Params

# docs/decisions/steps.md
_SQUARES, _OUTER = 0.95, 0.97  # memories of the averages
# Steps between two outer products, and refreshments of the bases with them: at first, and later
_OFTEN, _SELDOM = 10, 40
_LARGEST = 1024  # axes that are longer keep their own coordinates
_PER_COLUMN = 20  # as do those of so many entries or more for each column of the gradient
_FLOOR = 2.0**-32  # least square over the largest of its leaf
_KEPT = 2.0**-16  # of the trace: where outer products are smaller, the basis stays as it is


class Moments(NamedTuple):
    """State of the preconditioner; trees like the parameters, in float32 or wider.

    For each axis of a leaf with two or more a basis: eigenvectors of the averaged outer products of
    the gradient along it. The second moment is in these coordinates.

    Reference:
      N. Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, 2024.
    """

    gradients: Array  # int32 scalar, their number
    second_moment: Any  # running average from 0 of the squared gradients
    outer: Any  # for each leaf and axis the decaying sum (d, d) of outer products
    bases: Any  # for each leaf and axis (d, d), the eigenvectors in columns

    @classmethod
    def of(cls, params: Params) -> Moments:
        """Before the first gradient."""
        zeros = lambda p: jnp.zeros_like(p, wide_dtype(p.dtype))
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
            second_moment=jax.tree.map(zeros, params),
            outer=square(lambda size, dtype: jnp.zeros((size, size), dtype)),
            bases=square(lambda size, dtype: jnp.eye(size, dtype=dtype)),
        )

    def whitened(self, gradient: Params, early: int) -> tuple[Moments, Params]:
        """With one more gradient; new bases every ten of the ``early`` steps, later every forty.

        Also that gradient over the root of the second moment, in the coordinates of the parameters;
        in float32 or wider.
        """
        leaves, structure = jax.tree.flatten(gradient)
        if not leaves:
            return self, gradient
        leaves = [widen(leaf) for leaf in leaves]
        period = jnp.where(self.gradients < early, _OFTEN, _SELDOM)
        outer, bases, second = jax.lax.cond(
            self.gradients % period == 0,
            lambda flat: _refreshed(leaves, *flat),
            lambda flat: flat,
            (self.outer, self.bases, jax.tree.leaves(self.second_moment)),
        )
        weight = computed_once(jnp.sqrt(1 - _SQUARES ** (self.gradients + 1.0)))
        squares, directions = [], []
        for g, square, sides in zip(leaves, second, bases, strict=True):
            turned = _turned(g, sides)
            square = _SQUARES * square + (1 - _SQUARES) * jnp.square(turned)
            root = _root(square, sides)
            usable = root > 0
            turned = jnp.where(usable, weight * turned / jnp.where(usable, root, 1), 0)
            squares.append(square)
            directions.append(_turned(turned, sides, back=True))
        tree = lambda flat: jax.tree.unflatten(structure, flat)
        return Moments(self.gradients + 1, tree(squares), outer, bases), tree(directions)


def turned_axes(shape: Shape) -> tuple[int, ...]:
    """The axes that get a basis: those that the columns of some twenty gradients tell."""

    def told(size: int) -> bool:
        columns = math.prod(shape) / size if size else 0
        return size <= _LARGEST and columns > 1 and 1 < size < _PER_COLUMN * columns

    return tuple(axis for axis, size in enumerate(shape) if told(size))


def turning_multiplications(params: Params) -> int:
    """Those of turning one gradient into the bases and back."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    sides = lambda shape: sum(shape[axis] for axis in turned_axes(shape))
    return sum(2 * math.prod(shape) * sides(shape) for shape in shapes)


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


def _refreshed(gradient: list[Array], outer: Any, bases: Any, second: list[Array]) -> Any:
    """With one more outer product, and one step of subspace iteration, for each basis.

    Squares go over to new coordinates by the squares of the rotation: exact where coordinates are
    uncorrelated.
    """
    found: list[tuple[Any, Any, Array]] = []
    for g, totals, old, square in zip(gradient, outer, bases, second, strict=True):
        totals = tuple(_OUTER * total + _outer_product(g, axis) for total, axis in _axes(totals, g))
        new = ()
        if old:
            trace = jnp.trace(totals[0])  # the squares of all gradients, along whichever axis
            little = computed_once(jnp.where(trace > 0, _KEPT * trace, 1))
            new = tuple(_iterated(*sides, little) for sides in zip(totals, old, strict=True))
            turns = [jnp.square(einsum("ij,ik->jk", a, b)) for a, b in zip(old, new, strict=True)]
            square = _turned(square, tuple(turns))
        found.append((totals, new, square))
    outer, bases, squares = zip(*found, strict=True)
    return outer, bases, list(squares)


def _iterated(total: Array, basis: Array, little: Array) -> Array:
    """The orthonormal factor of (total + a little) basis.

    Without that little, rounding would choose the basis where there has been no gradient.
    """
    return jnp.linalg.qr(einsum("ij,jk->ik", total, basis) + little * basis)[0]
