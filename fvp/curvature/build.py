"""From a model, a head and a batch to an operator: whole, or in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_inexact_tree, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature.chunking import ChunkedPiece, split_chunks
from fvp.curvature.metrics import Examples, example_indices
from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.pieces import example_weights, total_weight
from fvp.heads import Head
from fvp.mesh import AxisName, row_axes, shard_count, to_local
from fvp.numerics import wide_dtype

MakePiece = Callable[[Callable[[Any], Array], Head, Any, Examples], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What the chunks of one batch have in common."""

    head: Head
    params: Any
    keys: Any
    batch_leaves: list[Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """The model and the data that an operator was linearised at."""

    params: Any
    batch: Any
    model_fn: Callable[[Any, Any], Array] = dataclasses.field(metadata={"static": True})
    batch_axes: tuple[int | None, ...] | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class ChunkRecipe:
    """Static: how one chunk's piece is made from the shared data and the chunk's examples."""

    make_piece: MakePiece
    model_fn: Callable[[Any, Any], Array]
    batch_structure: Any
    batch_axes: tuple[int | None, ...]

    def __call__(self, shared: Shared, chunk: tuple[list[Any], Examples]) -> Any:
        leaves, examples = chunk
        leaves = [
            whole if axis is None else jnp.moveaxis(part, 0, axis)
            for whole, part, axis in zip(shared.batch_leaves, leaves, self.batch_axes, strict=True)
        ]
        batch = jax.tree.unflatten(self.batch_structure, leaves)
        examples = dataclasses.replace(examples, keys=shared.keys)
        model = lambda params: self.model_fn(params, batch)
        return self.make_piece(model, shared.head, shared.params, examples)


def build_operator(
    make_piece: MakePiece,
    model_fn: Callable[[Any, Any], Array],
    head: Head,
    params: Any,
    batch: Any,
    examples: Examples,
    chunk_size: int | None,
    batch_axes: Any,
    axis_name: AxisName,
) -> CurvatureOperator:
    """Checks the arguments and linearises, compiled when called eagerly."""
    if not callable(model_fn):
        raise TypeError(f"model_fn: expected model_fn(params, batch) -> z, got {model_fn!r}.")
    if not isinstance(head, Head):
        raise TypeError(
            f"head: expected a head such as fvp.Softmax(), got {head!r} (an instance, not a class)."
        )
    params = to_local(check_inexact_tree(params, "params"), axis_name, "params")
    if chunk_size is None:
        # The axes are not needed for products: 0 stands for what an unfitting leaf may not have.
        axes = None if batch_axes == 0 else _leaf_axes(batch, batch_axes)
        return _build_whole(make_piece, model_fn, axis_name, axes, head, params, batch, examples)
    check_positive_int(chunk_size, "chunk_size")
    axes = _leaf_axes(batch, batch_axes)
    count = _example_count(batch, axes)
    if chunk_size >= count:
        return _build_whole(make_piece, model_fn, axis_name, axes, head, params, batch, examples)
    return _build_chunked(
        make_piece, model_fn, axis_name, axes, count, chunk_size, head, params, batch, examples
    )


@compiled_when_eager
def _build_whole(
    make_piece: MakePiece,
    model_fn: Callable[[Any, Any], Array],
    axis_name: AxisName,
    axes: tuple[int | None, ...] | None,
    head: Head,
    params: Any,
    batch: Any,
    examples: Examples,
) -> CurvatureOperator:
    piece = make_piece(lambda params: model_fn(params, batch), head, params, examples)
    shape = head.batch_shape(piece.output)
    total = total_weight(piece.weights, piece.output, shape, axis_name)
    source = Source(params, batch, model_fn, axes)
    return CurvatureOperator.of(piece, total, params, axis_name, source)


@compiled_when_eager
def _build_chunked(
    make_piece: MakePiece,
    model_fn: Callable[[Any, Any], Array],
    axis_name: AxisName,
    axes: tuple[int | None, ...],
    count: int,
    chunk_size: int,
    head: Head,
    params: Any,
    batch: Any,
    examples: Examples,
) -> CurvatureOperator:
    leaves, structure = jax.tree.flatten(batch)
    pairs = list(zip(leaves, axes, strict=True))
    moved = [None if axis is None else jnp.moveaxis(leaf, axis, 0) for leaf, axis in pairs]
    rows = next(filter(None, map(row_axes, jax.tree.leaves(moved))), None)
    local_count = count // shard_count(rows)
    number = -(-local_count // max(1, chunk_size // shard_count(rows)))
    z = jax.eval_shape(model_fn, params, batch)
    head.check_outputs(z)
    if z.shape[0] != count:
        raise ValueError(
            f"chunk_size: expected the model's output to have the {count} examples of the batch on"
            f" its first axis, got shape {z.shape}."
        )
    targets = None if examples.targets is None else head.check_targets(z, examples.targets)
    weights = example_weights(head, z, examples.weights)
    shape = head.batch_shape(z)
    counted = weights
    if counted is None and local_count % number:
        counted = jnp.ones(shape, wide_dtype(z.dtype))  # the padding has weight zero

    chunks = (
        split_chunks(moved, number, rows),
        Examples(
            targets=split_chunks(targets, number, rows),
            weights=split_chunks(counted, number, rows, wrap=False),
            indices=split_chunks(example_indices(count, examples.shard), number, rows),
        ),
    )
    whole = [leaf if axis is None else None for leaf, axis in pairs]
    shared = Shared(head, params, examples.keys, whole)
    recipe = ChunkRecipe(make_piece, model_fn, structure, axes)
    piece = ChunkedPiece(shared, chunks, count, rows, recipe)
    return CurvatureOperator.of(
        piece, total_weight(weights, z, shape, axis_name), params, axis_name
    )


def _leaf_axes(batch: Any, batch_axes: Any) -> tuple[int | None, ...]:
    """One example axis, or None, for each leaf of ``batch``; ``batch_axes`` is a tree prefix."""
    try:
        spread = jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)),
            batch_axes,
            batch,
            is_leaf=lambda axis: axis is None,
        )
    except ValueError as error:
        raise ValueError(
            f"batch_axes: expected an int, None, or a tree prefix of the batch, got {batch_axes!r}"
            f" for a batch of structure {jax.tree.structure(batch)}."
        ) from error
    axes = jax.tree.leaves(spread, is_leaf=lambda axis: axis is None)
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(batch), axes, strict=True):
        if axis is not None and not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"batch_axes: batch{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and no"
                f" axis {axis} of examples; give None for leaves that all chunks share."
            )
    return tuple(axes)


def _example_count(batch: Any, axes: tuple[int | None, ...]) -> int:
    """The number of examples, which the leaves of ``batch`` must agree on."""
    leaves = jax.tree.leaves(batch)
    counts = {jnp.shape(x)[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None}
    if len(counts) != 1:
        raise ValueError(
            "batch_axes: expected one number of examples along the example axes of the batch, got"
            f" {sorted(counts) or 'no leaf with an example axis'}."
        )
    return counts.pop()
