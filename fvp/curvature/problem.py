"""What a curvature and a loss are of, in one record: model, parameters, batch and head."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import broadcast_weights, check_inexact_tree
from fvp.curvature.presence import without_absent
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.mesh import AxisName, check_axis_name, device_count, sum_over, to_local
from fvp.model import Model, close_model
from fvp.numerics import wide_dtype, widen
from fvp.records import Record
from fvp.typing import Batch, ModelFn, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Problem(Record):
    """The loss L = sum_i w_i nll_i / sum_i w_i of a model at a batch; a pytree.

    Attributes:
      model: ``model(params, batch) -> z``, with the arrays that it is closed over.
      head: the output distribution.
      params: pytree of floating-point arrays.
      batch: pytree of arrays that the model reads.
      targets: the data's labels, or None where nothing reads them.
      weights: one weight for each example, broadcastable to the batch axes of z, or None.
      keys: (S,) random keys, one for each Monte Carlo sample, or None.
      indices: (N,) position of each row in the batch, or None for rows in order.
      shard: number of the device's part, where the batch is split over a named axis, or None.
      axes: the example axis, or None, of each leaf of ``batch``; None where it is the first of all.
      axis_name: the mesh axes that the batch is split over inside ``shard_map``, or None.
      uncentered: where ``model`` takes the weighted mean over the examples out of the outputs of
        another, that other one, which treats the examples independently; or None.
    """

    model: Model
    head: Head
    params: Params
    batch: Batch
    targets: PyTree = None
    weights: ArrayLike | None = None
    keys: Array | None = None
    indices: Array | None = None
    shard: Array | None = None
    axes: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    axis_name: AxisName = dataclasses.field(default=None, metadata={"static": True})
    uncentered: Model | None = None

    @classmethod
    def of(
        cls,
        model_fn: ModelFn,
        head: Head,
        params: Params,
        batch: Batch,
        *,
        batch_axes: PyTree = 0,
        axis_name: AxisName = None,
        **data: Any,
    ) -> Self:
        """Checks the arguments that users pass; ``data`` are the other fields.

        Raises:
          TypeError, ValueError: naming the argument that does not fit.
        """
        model, batch = close_model(model_fn, batch)
        check_head(head)
        params = to_local(check_inexact_tree(params, "params"), axis_name, "params")
        head, layout = head.on_one_array(lambda: model(params, batch))
        if layout is not None:
            model = dataclasses.replace(model, layout=layout)
        # inject_hyperparams may have made an array of the default.
        default = isinstance(batch_axes, jax.Array) or batch_axes == 0
        axes = None if default else leaf_axes(batch, batch_axes)
        return cls(model, head, params, batch, axes=axes, axis_name=axis_name, **data)

    @property
    def batch_axes(self) -> Any:
        """The example axes as a tree prefix of the batch."""
        if self.axes is None:
            return 0
        return jax.tree.unflatten(jax.tree.structure(self.batch), self.axes)

    def outputs(self, params: Params) -> Array:
        """The model's z at ``params``."""
        return self.model(params, self.batch)

    def check_outputs(self, z: Any) -> None:
        """Raises where the model's outputs, or their shapes, do not fit the head or the mesh."""
        self.head.check_outputs(z)
        check_axis_name(self.params, z)

    def before_centering(self) -> Self:
        """The same of the model whose mean is not taken out, where there is one."""
        if self.uncentered is None:
            return self
        return dataclasses.replace(self, model=self.uncentered, uncentered=None)

    def present(self) -> Self:
        """The same with inputs of weight zero that are not finite replaced by others."""
        if self.weights is None:
            return self
        shapes = lambda: jax.eval_shape(self.outputs, self.params)
        batch = without_absent(self.head, self.batch, self.axes, self.weights, shapes)
        return dataclasses.replace(self, batch=batch)

    def example_weights(self, z: Any) -> Array | None:
        """The weights over all batch axes of ``z``; raises where ``z`` does not fit the head."""
        self.head.check_outputs(z)
        if self.weights is None:
            return None
        return broadcast_weights(self.weights, self.head.batch_shape(z), wide_dtype(z.dtype))

    def total_weight(self, z: Any) -> Array:
        """sum_i w_i; infinite where that is zero: dividing by it gives the promised zero."""
        weights = self.example_weights(z)
        if weights is None:
            count = math.prod(self.head.batch_shape(z)) * device_count(self.axis_name)
            return jnp.asarray(count, wide_dtype(z.dtype))
        total = sum_over(jnp.sum(weights), self.axis_name)
        return jnp.where(total == 0, jnp.inf, total)

    def weighted(self, values: Array, z: Any) -> Array:
        """sum_i w_i values_i / sum_i w_i over all devices, for ``values`` over the batch axes."""
        total = jnp.sum(apply_weights(self.example_weights(z), 0, values))
        return sum_over(total, self.axis_name) / self.total_weight(z)

    def loss(self, z: Array) -> Array:
        """The loss L at the outputs ``z``, up to a term of the targets alone."""
        return self.weighted(self.head.relative_nll(self._masked(z), self.targets), z)

    def kl(self, z: Array, z_new: Array) -> Array:
        """sum_i w_i KL(r(z_i) to r(z_new_i)) / sum_i w_i."""
        return self.weighted(self.head.kl(self._masked(z), self._masked(z_new)), z)

    def _masked(self, z: Array) -> Array:
        return widen(mask_outputs(self.example_weights(z), self.head.event_ndim, z))


def required_targets(targets: PyTree) -> Any:
    """Raises unless there are targets."""
    if targets is None:
        raise ValueError("targets: expected the labels of the batch, got None.")
    return targets


def apply_weights(weights: Array | None, event_ndim: int, x: Array) -> Array:
    """w_i x_i over the event axes of ``x``; exactly zero at zero weight, whatever x_i is there."""
    if weights is None:
        return x
    w = weights.reshape(weights.shape + (1,) * event_ndim)
    return jnp.where(w == 0, 0, w * x)


def mask_outputs(weights: Array | None, event_ndim: int, z: Array) -> Array:
    """``z`` with rows of zero weight replaced by zeros, so that nothing non-finite starts there."""
    if weights is None:
        return z
    w = weights.reshape(weights.shape + (1,) * event_ndim)
    return jnp.where(w == 0, 0, z)


def example_indices(count: int, shard: Array | None) -> Array:
    """Positions of ``count`` rows in the whole batch, of which they are part number ``shard``."""
    return jnp.arange(count) + (0 if shard is None else shard * count)


def leaf_axes(batch: Batch, batch_axes: PyTree) -> tuple[int | None, ...]:
    """One example axis, or None, for each leaf of ``batch``; ``batch_axes`` is a tree prefix."""
    axes = spread_axes(batch, batch_axes)
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(batch), axes, strict=True):
        if axis is not None and not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"batch_axes: batch{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and no"
                f" axis {axis} of examples; give None for leaves that all chunks share."
            )
    ranks = map(jnp.ndim, jax.tree.leaves(batch))
    return tuple(a if a is None else a % n for a, n in zip(axes, ranks, strict=True))


def spread_axes(batch: Batch, batch_axes: PyTree) -> list[int | None]:
    """The entry of the tree prefix ``batch_axes`` at each leaf of ``batch``."""
    is_none = lambda axis: axis is None
    try:
        spread = jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)),
            batch_axes,
            batch,
            is_leaf=is_none,
        )
    except ValueError as error:
        raise ValueError(
            f"batch_axes: expected an int, None, or a tree prefix of the batch, got {batch_axes!r}"
            f" for a batch of structure {jax.tree.structure(batch)}."
        ) from error
    return jax.tree.leaves(spread, is_leaf=is_none)
