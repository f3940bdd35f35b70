"""Bounded memory: the linearisation is recomputed a few examples at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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

    ``chunks`` is what differs from chunk to chunk, with a leading axis of chunks; ``shared`` is
    what they have in common; ``build(shared, chunk)`` linearises one of them.
    """

    shared: Any
    chunks: Any
    count: int = dataclasses.field(metadata={"static": True})
    rows: Any = dataclasses.field(metadata={"static": True})  # mesh axes of the examples
    build: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})

    @property
    def output(self) -> Array:
        """The model's output z, by one forward pass."""
        z = jax.lax.map(lambda chunk: self.build(self.shared, chunk).output, self.chunks)
        return join_chunks(z, self.count, self.rows)

    def product(self, v: Any) -> Any:
        """The product, summed over chunks."""
        return cast_like(self._sum(lambda piece, _: piece.product(v)), v)

    def quadratic_form(self, v: Any) -> Array:
        """The quadratic form, summed over chunks."""
        return self._sum(lambda piece, _: piece.quadratic_form(v))

    def value_and_gradient(self, targets: Any) -> tuple[Array, Any]:
        """Loss and gradient, summed over chunks."""
        if jnp.shape(targets)[:1] != (self.count,):
            raise ValueError(
                f"targets: expected the {self.count} examples of the batch on the first axis, got"
                f" shape {jnp.shape(targets)}."
            )
        number = jax.tree.leaves(self.chunks)[0].shape[0]
        targets = split_chunks(jnp.asarray(targets), number, self.rows)
        value, gradient = self._sum(lambda piece, y: piece.value_and_gradient(y), targets)
        return value, cast_like(gradient, self.shared.params)

    def _sum(self, term: Callable[[Any, Any], Any], extra: Any = None) -> Any:
        """Sum of ``term(piece, extra)`` over chunks, accumulated in float32 or wider."""

        def evaluate(chunk: Any, extra: Any) -> Any:
            return widen_tree(term(self.build(self.shared, chunk), extra))

        def step(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, evaluate(*xs)), None

        first = jax.tree.map(lambda x: x[0], (self.chunks, extra))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(evaluate, *first))
        return jax.lax.scan(step, zeros, (self.chunks, extra))[0]


def split_chunks(tree: Any, number: int, rows: Any = None, *, wrap: bool = True) -> Any:
    """Leaves (N, ...) -> (number, ceil(N / number), ...), padded with the first rows, or zeros.

    Chunk i takes the examples i, i + number, i + 2 number, ...: an example axis that is split over
    devices then stays split inside every chunk.
    """

    def split(x: Array) -> Array:
        size = -(-x.shape[0] // number)
        padding = x[: size * number - x.shape[0]]
        padded = jnp.concatenate([x, padding if wrap else jnp.zeros_like(padding)])
        return jnp.moveaxis(padded.reshape(size, number, *x.shape[1:]), 1, 0)

    return jax.tree.map(lambda x: map_rows(split, shard_rows(x, rows), rows, 0, 1), tree)


def join_chunks(x: Array, count: int, rows: Any = None) -> Array:
    """The inverse of :func:`split_chunks` for ``count`` examples."""
    local_count = count // shard_count(rows)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(-1, *x.shape[2:])[:local_count]

    return map_rows(join, x, rows, 1, 0)
