"""Bounded memory: the linearisation is recomputed a few examples at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.curvature.linearized import Linearize, LinearizedCurvature
from fvp.curvature.problem import Problem, example_indices, leaf_axes
from fvp.mesh import map_rows, row_axes, shard_count, shard_rows
from fvp.numerics import cast_like, scan_sum, wide_dtype, widen_tree
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Chunked(LinearizedCurvature):
    """The sum of the curvatures of all chunks, each linearised anew inside every product.

    Attributes:
      chunks: the problem with its examples regrouped into ``number`` chunks (`split_chunks`).
      count: the number of examples.
      rows: the mesh axes of the examples.
      linearize: makes the curvature of one chunk.
    """

    chunks: Problem
    count: int = dataclasses.field(metadata={"static": True})
    number: int = dataclasses.field(metadata={"static": True})
    rows: Any = dataclasses.field(metadata={"static": True})
    linearize: Linearize = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, linearize: Linearize, problem: Problem, chunk_size: int) -> Self:
        """Regroups the examples into chunks of at most ``chunk_size`` on each device."""
        axes = example_axes(problem)
        problem = problem.present()
        # What does not fit is named with the shapes of the whole batch.
        z = jax.eval_shape(lambda: linearize(problem).output)
        problem.check_outputs(z)
        leaves, structure = jax.tree.flatten(problem.batch)
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        count = example_count(problem)
        if z.shape[0] != count:
            raise ValueError(
                f"chunk_size: expected the model's output to have the {count} examples of the batch"
                f" on its first axis, got shape {z.shape}."
            )
        pairs = list(zip(leaves, axes, strict=True))
        split_over = (row_axes(leaf, axis) for leaf, axis in pairs if axis is not None)
        rows = next(filter(None, split_over), None)
        local_count = count // shard_count(rows)
        number = -(-local_count // max(1, chunk_size // shard_count(rows)))
        weights = problem.example_weights(z)
        targets = jax.tree.map(jnp.asarray, problem.targets)
        for leaf in jax.tree.leaves(targets):
            check_example_axis(leaf, count)
        if weights is None and local_count % number:  # the padding has weight zero
            weights = jnp.ones(problem.head.batch_shape(z), wide_dtype(z.dtype))
        split = lambda x, **options: None if x is None else split_chunks(x, number, rows, **options)
        leaves = [leaf if axis is None else split(leaf, axis=axis) for leaf, axis in pairs]
        chunks = dataclasses.replace(
            problem,
            batch=jax.tree.unflatten(structure, leaves),
            targets=jax.tree.map(split, targets),
            weights=split(weights, wrap=False),
            indices=split(example_indices(count, problem.shard)),
            axes=axes,
        )
        return cls(chunks, count, number, rows, linearize)

    @property
    def output(self) -> Array:
        """The model's output z, by one forward pass."""
        z = jax.lax.map(lambda i: self._chunk(i).output, jnp.arange(self.number))
        return join_chunks(z, self.count, self.rows)

    def product(self, v: Params, scale: Array) -> Params:
        """The product, summed over chunks."""
        return cast_like(self._sum(lambda chunk, _: chunk.product(v, scale)), v)

    def product_and_form(self, v: Params, scale: Array) -> tuple[Params, Array]:
        """The product and its inner product with ``v``, summed over chunks."""
        product, form = self._sum(lambda chunk, _: chunk.product_and_form(v, scale))
        return cast_like(product, v), form

    def inner_products(self, vectors: Sequence[Params], scale: Array) -> Array:
        """The inner products of all pairs, summed over chunks."""
        return self._sum(lambda chunk, _: chunk.inner_products(vectors, scale))

    def value_and_gradient(self, targets: PyTree, scale: Array) -> tuple[Array, Params]:
        """Loss and gradient, summed over chunks."""
        targets = jax.tree.map(jnp.asarray, targets)
        for leaf in jax.tree.leaves(targets):
            check_example_axis(leaf, self.count)
        targets = jax.tree.map(lambda x: split_chunks(x, self.number, self.rows), targets)
        take = lambda i: jax.tree.map(lambda x: take_chunk(x, i), targets)
        term = lambda chunk, i: chunk.value_and_gradient(take(i), scale)
        value, gradient = self._sum(term)
        return value, cast_like(gradient, self.chunks.params)

    def _chunk(self, i: Array) -> LinearizedCurvature:
        """The curvature of chunk number ``i``."""
        take = lambda x: jax.tree.map(lambda x: take_chunk(x, i), x)
        leaves, structure = jax.tree.flatten(self.chunks.batch)
        axes = self.chunks.axes
        assert axes is not None
        leaves = [
            leaf if axis is None else take_chunk(leaf, i, axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        chunk = dataclasses.replace(
            self.chunks,
            batch=jax.tree.unflatten(structure, leaves),
            targets=take(self.chunks.targets),
            weights=take(self.chunks.weights),
            indices=take(self.chunks.indices),
        )
        return self.linearize(chunk)

    def _sum(self, term: Callable[[Any, Array], Any]) -> Any:
        """Sum of ``term(curvature of chunk i, i)``, accumulated in float32 or wider."""
        evaluate = lambda i: widen_tree(term(self._chunk(i), i))
        return scan_sum(evaluate, jnp.arange(self.number))


def example_axes(problem: Problem) -> tuple[int | None, ...]:
    """The example axis of each leaf of the batch, which chunks are taken along."""
    return leaf_axes(problem.batch, 0) if problem.axes is None else problem.axes


def example_count(problem: Problem) -> int:
    """The number of examples, which the leaves of the batch must agree on."""
    pairs = zip(jax.tree.leaves(problem.batch), example_axes(problem), strict=True)
    counts = {jnp.shape(x)[axis] for x, axis in pairs if axis is not None}
    if len(counts) != 1:
        raise ValueError(
            "batch_axes: expected one number of examples along the example axes of the batch, got"
            f" {sorted(counts) or 'no leaf with an example axis'}."
        )
    return counts.pop()


def check_example_axis(targets: ArrayLike, count: int) -> None:
    """Raises unless targets have ``count`` examples on their first axis."""
    if jnp.shape(targets)[:1] != (count,):
        raise ValueError(
            f"targets: expected the {count} examples of the batch on the first axis, got shape"
            f" {jnp.shape(targets)}."
        )


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
    """Chunk number ``i`` of what `split_chunks` regrouped."""
    return jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)


def join_chunks(x: Array, count: int, rows: Any = None) -> Array:
    """Chunks (number, size, ...) to the ``count`` examples in their order."""
    local_count = count // shard_count(rows)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(-1, *x.shape[2:])[:local_count]

    return map_rows(join, x, rows, 1, 0)
