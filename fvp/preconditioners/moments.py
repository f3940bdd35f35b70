"""Moments of the gradient, kept in the eigenbases of its averaged outer products."""

from __future__ import annotations

import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.products import einsum
from fvp.numerics import cast_like, wide_dtype, widen
from fvp.tracing.steps import Shape
from fvp.typing import Params

# docs/decisions/steps.md
_MEAN, _SQUARES, _OUTER = 0.9, 0.95, 0.95  # memories of the averages
_PERIOD = 10  # steps between two refreshments of the bases
_LARGEST = 1024  # axes that are longer keep their own coordinates
_FLOOR = 2.0**-40  # least square over the largest of its leaf


class Moments(NamedTuple):
    """State of the preconditioner; trees like the parameters, in float32 or wider.

    For each axis of a leaf with two or more a basis: eigenvectors of the averaged outer products of
    the gradient along it. Both moments are in these coordinates.
    """

    gradients: Array  # int32 scalar, their number
    first_moment: Any  # running average from 0 of the gradients
    second_moment: Any  # running average from 0 of their squares
    outer: Any  # for each leaf and axis the decaying sum (d, d) of the outer products
    bases: Any  # for each leaf and axis (d, d), the eigenvectors in columns

    @classmethod
    def of(cls, params: Params) -> Moments:
        """Before the first gradient."""
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p.dtype)), params)
        leaves = jax.tree.leaves(params)
        # ``optax.tree.map_params`` makes the state of parameters without leaves, where one leaf has
        # to stand for the matrices of all.
        square = lambda make: (
            jnp.zeros(())
            if not leaves
            else tuple(
                tuple(make(p.shape[axis], wide_dtype(p.dtype)) for axis in turned_axes(p.shape))
                for p in leaves
            )
        )
        return cls(
            gradients=jnp.zeros((), jnp.int32),
            first_moment=zeros(),
            second_moment=zeros(),
            outer=square(lambda size, dtype: jnp.zeros((size, size), dtype)),
            bases=square(lambda size, dtype: jnp.eye(size, dtype=dtype)),
        )

    def updated(self, gradient: Params) -> Moments:
        """With one more gradient; every ten steps with new bases."""
        leaves, structure = jax.tree.flatten(gradient)
        if not leaves:
            return self
        leaves = [widen(leaf) for leaf in leaves]
        outer = tuple(
            tuple(_OUTER * total + _outer_product(g, axis) for total, axis in _axes(totals, g))
            for totals, g in zip(self.outer, leaves, strict=True)
        )
        flat = (self.bases, jax.tree.leaves(self.first_moment), jax.tree.leaves(self.second_moment))
        bases, mean, squares = jax.lax.cond(
            self.gradients % _PERIOD == 0,
            lambda flat: _refreshed(outer, *flat),
            lambda flat: flat,
            flat,
        )
        turned = [_turned(g, basis) for g, basis in zip(leaves, bases, strict=True)]
        add = lambda old, new, memory: memory * old + (1 - memory) * new
        mean = [add(m, g, _MEAN) for m, g in zip(mean, turned, strict=True)]
        squares = [add(s, jnp.square(g), _SQUARES) for s, g in zip(squares, turned, strict=True)]
        tree = lambda flat: jax.tree.unflatten(structure, flat)
        return Moments(self.gradients + 1, tree(mean), tree(squares), outer, bases)

    def direction(self, like: Params) -> Params:
        """The mean over the root of the squares, turned back; in the dtypes of ``like``."""
        leaves, structure = jax.tree.flatten(self.first_moment)
        if not leaves:
            return like
        weight = lambda memory: 1 - memory ** self.gradients.astype(jnp.float32)
        found = []
        for mean, square, bases in zip(
            leaves, jax.tree.leaves(self.second_moment), self.bases, strict=True
        ):
            mean, square = mean / weight(_MEAN), square / weight(_SQUARES)
            root = jnp.sqrt(jnp.maximum(square, _FLOOR * jnp.max(square, initial=0)))
            ratio = jnp.where(root > 0, mean / jnp.where(root > 0, root, 1), 0)
            found.append(_turned(ratio, bases, back=True))
        return cast_like(jax.tree.unflatten(structure, found), like)


def turned_axes(shape: Shape) -> tuple[int, ...]:
    """The axes that get a basis."""
    if len(shape) < 2:
        return ()
    return tuple(axis for axis, size in enumerate(shape) if 1 < size <= _LARGEST)


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


def _refreshed(outer: Any, bases: Any, mean: list[Array], squares: list[Array]) -> Any:
    """One step of subspace iteration for each basis, and the moments in the new coordinates.

    Squares go over by the squares of the rotation: exact where coordinates are uncorrelated, and
    with the mean never larger than their roots allow.
    """
    found: tuple[list[Any], list[Array], list[Array]] = ([], [], [])
    for totals, old, m, s in zip(outer, bases, mean, squares, strict=True):
        new = tuple(_iterated(total, basis) for total, basis in zip(totals, old, strict=True))
        turns = tuple(einsum("ij,ik->jk", a, b) for a, b in zip(old, new, strict=True))
        found[0].append(new)
        found[1].append(_turned(m, turns))
        found[2].append(_turned(s, tuple(jnp.square(turn) for turn in turns)))
    return tuple(found[0]), found[1], found[2]


def _iterated(total: Array, basis: Array) -> Array:
    """The orthonormal factor of (total + a little) basis."""
    trace = jnp.trace(total)
    usable = jnp.isfinite(trace) & (trace > 0)
    scaled = total / jnp.where(usable, trace, 1)
    product = einsum("ij,jk->ik", scaled, basis) + jnp.finfo(total.dtype).eps * basis
    return jnp.where(usable, jnp.linalg.qr(product)[0], basis)
