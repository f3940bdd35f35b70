"""From a model, a head and a batch to an operator: whole, or in chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_inexact_tree, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature.chunking import ChunkedPiece, split_chunks, take_chunk
from fvp.curvature.metrics import Examples, example_indices
from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.pieces import example_weights, total_weight
from fvp.curvature.presence import without_absent
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.mesh import AxisName, check_axis_name, row_axes, shard_count, to_local
from fvp.model import Model, close_model
from fvp.numerics import wide_dtype

MakePiece = Callable[[Callable[[Any], Array], Head, Any, Examples], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regrouped:
    """A batch and its examples, regrouped into chunks, beside what all chunks share."""

    model: Model
    head: Head
    params: Any
    batch_leaves: list[Any]
    examples: Examples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """The model and the data that an operator was linearised at.

    The leaves of ``batch`` are arrays alone, and ``model_fn`` is a pytree of arrays: both cross
    ``jit``. Inputs of examples without weight are finite.
    """

    params: Any
    batch: Any
    model_fn: Model
    batch_axes: tuple[int | None, ...] | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class ChunkRecipe:
    """Static: how the piece of one chunk is made."""

    make_piece: MakePiece
    batch_structure: Any
    batch_axes: tuple[int | None, ...]

    def __call__(self, data: Regrouped, i: Any) -> Any:
        leaves = [
            leaf if axis is None else take_chunk(leaf, i, axis)
            for leaf, axis in zip(data.batch_leaves, self.batch_axes, strict=True)
        ]
        batch = jax.tree.unflatten(self.batch_structure, leaves)
        examples = data.examples
        targets, weights, indices = jax.tree.map(
            lambda x: take_chunk(x, i), (examples.targets, examples.weights, examples.indices)
        )
        chunk = Examples(targets, weights, examples.keys, indices)
        model = lambda params: data.model(params, batch)
        return self.make_piece(model, data.head, data.params, chunk)


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
    model, batch = close_model(model_fn, batch)
    check_head(head)
    params = to_local(check_inexact_tree(params, "params"), axis_name, "params")
    if chunk_size is None:
        # Products need no axes, so that 0 may stand for what a leaf lacks, and inject_hyperparams
        # may have made an array of it.
        default = isinstance(batch_axes, jax.Array) or batch_axes == 0
        axes = None if default else _leaf_axes(batch, batch_axes)
        return _build_whole(make_piece, model, axis_name, axes, head, params, batch, examples)
    check_positive_int(chunk_size, "chunk_size")
    axes = _leaf_axes(batch, batch_axes)
    count = _example_count(batch, axes)
    if chunk_size >= count:
        return _build_whole(make_piece, model, axis_name, axes, head, params, batch, examples)
    return _build_chunked(
        make_piece, model, axis_name, axes, count, chunk_size, head, params, batch, examples
    )


@compiled_when_eager
def _build_whole(
    make_piece: MakePiece,
    model: Model,
    axis_name: AxisName,
    axes: tuple[int | None, ...] | None,
    head: Head,
    params: Any,
    batch: Any,
    examples: Examples,
) -> CurvatureOperator:
    batch = without_absent(model, head, params, batch, axes, examples.weights)
    piece = make_piece(lambda params: model(params, batch), head, params, examples)
    check_axis_name(params, piece.output)
    shape = head.batch_shape(piece.output)
    total = total_weight(piece.weights, piece.output, shape, axis_name)
    source = Source(params, batch, model, axes)
    return CurvatureOperator.of(piece, total, math.prod(shape), params, axis_name, source)


@compiled_when_eager
def _build_chunked(
    make_piece: MakePiece,
    model: Model,
    axis_name: AxisName,
    axes: tuple[int | None, ...],
    count: int,
    chunk_size: int,
    head: Head,
    params: Any,
    batch: Any,
    examples: Examples,
) -> CurvatureOperator:
    batch = without_absent(model, head, params, batch, axes, examples.weights)
    leaves, structure = jax.tree.flatten(batch)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    pairs = list(zip(leaves, axes, strict=True))
    split_over = (row_axes(leaf, axis) for leaf, axis in pairs if axis is not None)
    rows = next(filter(None, split_over), None)
    local_count = count // shard_count(rows)
    number = -(-local_count // max(1, chunk_size // shard_count(rows)))
    z = jax.eval_shape(lambda *args: model(*args), params, batch)
    head.check_outputs(z)
    check_axis_name(params, z)
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

    split = lambda x, **options: None if x is None else split_chunks(x, number, rows, **options)
    regrouped = Examples(
        targets=split(targets),
        weights=split(counted, wrap=False),
        keys=examples.keys,
        indices=split(example_indices(count, examples.shard)),
    )
    leaves = [leaf if axis is None else split(leaf, axis=axis) for leaf, axis in pairs]
    data = Regrouped(model, head, params, leaves, regrouped)
    recipe = ChunkRecipe(make_piece, structure, axes)
    piece = ChunkedPiece(data, count, number, rows, recipe)
    total = total_weight(weights, z, shape, axis_name)
    return CurvatureOperator.of(piece, total, math.prod(shape), params, axis_name)


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
    ranks = map(jnp.ndim, jax.tree.leaves(batch))
    return tuple(a if a is None else a % n for a, n in zip(axes, ranks, strict=True))


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
