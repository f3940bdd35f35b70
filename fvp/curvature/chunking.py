"""Bounded memory: the linearisation is recomputed a few examples at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.mesh import map_rows, shard_count, shard_rows
from fvp.numerics import cast_like, widen_tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedPiece:
    """The sum of the pieces of all chunks, each built anew inside every product.

    ``build(data, i)`` linearises chunk number i, of ``number``, of the ``count`` examples.
    """

    data: Any
    count: int = dataclasses.field(metadata={"static": True})
    number: int = dataclasses.field(metadata={"static": True})
    rows: Any = dataclasses.field(metadata={"static": True})  # mesh axes of the examples
    build: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})

    @property
    def output(self) -> Array:
        """The model's output z, by one forward pass."""
        z = jax.lax.map(lambda i: self.build(self.data, i).output, jnp.arange(self.number))
        return join_chunks(z, self.count, self.rows)

    def product(self, v: Any, scale: Array) -> Any:
        """The product, summed over chunks."""
        return cast_like(self._sum(lambda piece, _: piece.product(v, scale)), v)

    def product_and_form(self, v: Any, scale: Array) -> tuple[Any, Array]:
        """The product and its inner product with ``v``, summed over chunks."""
        product, form = self._sum(lambda piece, _: piece.product_and_form(v, scale))
        return cast_like(product, v), form

    def inner_products(self, vectors: Sequence[Any], scale: Array) -> Array:
        """The inner products of all pairs, summed over chunks."""
        return self._sum(lambda piece, _: piece.inner_products(vectors, scale))

    def value_and_gradient(self, targets: Any, scale: Array) -> tuple[Array, Any]:
        """Loss and gradient, summed over chunks."""
        if jnp.shape(targets)[:1] != (self.count,):
            raise ValueError(
                f"targets: expected the {self.count} examples of the batch on the first axis, got"
                f" shape {jnp.shape(targets)}."
            )
        targets = split_chunks(jnp.asarray(targets), self.number, self.rows)
        term = lambda piece, i: piece.value_and_gradient(take_chunk(targets, i), scale)
        value, gradient = self._sum(term)
        return value, cast_like(gradient, self.data.params)

    def _sum(self, term: Callable[[Any, Any], Any]) -> Any:
        """Sum of ``term(piece, i)`` over chunks, accumulated in float32 or wider."""
        evaluate = lambda i: widen_tree(term(self.build(self.data, i), i))

        def step(total: Any, i: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, evaluate(i)), None

        indices = jnp.arange(self.number)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(evaluate, indices[0]))
        return jax.lax.scan(step, zeros, indices)[0]


def split_chunks(
    x: Array, number: int, rows: Any = None, *, axis: int = 0, wrap: bool = True
) -> Array:
    """Regroups N examples as (ceil(N / number), number), padded with the first ones, or zeros.

    Chunk i takes the examples i, i + number, i + 2 number, ...: an example axis that is split over
    devices then stays split inside every chunk, and where ``number`` divides N nothing is copied.
    """

    def split(x: Array) -> Array:
        count, shape = x.shape[axis], x.shape
        size = -(-count // number)
        if size * number != count:
            padding = jax.lax.slice_in_dim(x, 0, size * number - count, axis=axis)
            x = jnp.concatenate([x, padding if wrap else jnp.zeros_like(padding)], axis)
        return x.reshape(*shape[:axis], size, number, *shape[axis + 1 :])

    return map_rows(split, shard_rows(x, rows, axis), rows, axis, axis)


def take_chunk(x: Array, i: Any, axis: int = 0) -> Array:
    """Chunk number ``i`` of what :func:`split_chunks` regrouped."""
    return jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)


def join_chunks(x: Array, count: int, rows: Any = None) -> Array:
    """Chunks (number, size, ...) to the ``count`` examples in their order."""
    local_count = count // shard_count(rows)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(-1, *x.shape[2:])[:local_count]

    return map_rows(join, x, rows, 1, 0)
