"""A batch, captured: the gradients of every group of uses, for the columns of a curvature."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from fvp.curvature import OutputCurvature, Problem
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import Columns, columns_of
from fvp.layers.groups import GroupGradients, groups_of
from fvp.numerics import widen
from fvp.tracing.capture import Capture, capture
from fvp.tracing.coverage import check_covered
from fvp.typing import PyTree

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class CapturedBatch:
    """Lives inside one trace; for the letters E and K see `fvp.tracing.uses`.

    Attributes:
      layers: the capture.
      make_columns: the batch axes along which each entry of z has columns of its own -> cotangents.
      separate: those axes where the model mixes entries along some of them.
      columns: the cotangents.
      shares: share of each example in the total weight.
      groups: numbers of the uses that belong together.
      inputs: of each use, as in the capture; zeros where an example has no weight.
    """

    layers: Capture
    make_columns: Callable[[tuple[int, ...]], Columns]
    separate: tuple[int, ...]
    columns: Columns
    shares: Float[Array, " E"]
    groups: tuple[tuple[int, ...], ...]
    inputs: tuple[Array | None, ...]

    @classmethod
    def of(
        cls, layers: Capture, make_columns: Callable[[tuple[int, ...]], Columns]
    ) -> CapturedBatch:
        """The captured batch for columns ``make_columns(separate)``."""
        axes = range(len(layers.batch_shape))
        separate = tuple(axis for axis in axes if axis not in layers.examples)
        columns = make_columns(separate)
        shares = jnp.sum(columns.shares, axis=separate).ravel()
        inputs = tuple(None if x is None else _present(x, shares) for x in layers.inputs)
        groups = tuple(groups_of(layers))
        return cls(layers, make_columns, separate, columns, shares, groups, inputs)

    @property
    def unmatched(self) -> list[int]:
        """The leaves that some use without a layer rule reads."""
        return sorted({use.view.leaf for use in self.layers.unmatched})

    def gradients(self, cotangents: Float[Array, "K ..."]) -> list[GroupGradients]:
        """The gradients of each group of uses, for these cotangents of z."""
        outputs = self.layers.outputs(cotangents)
        found = []
        for group in self.groups:
            uses = tuple(self.layers.uses[number] for number in group)
            inputs = tuple(self.inputs[number] for number in group)
            deltas = tuple(_present(outputs[number], self.shares, 1) for number in group)
            found.append(GroupGradients(uses, inputs, deltas))
        return found

    def sum(self, function: Callable[[list[GroupGradients]], PyTree]) -> PyTree:
        """The sum over the columns, a few at a time, of ``function(gradients)``."""
        largest = max((math.prod(use.shape) for use in self.layers.uses), default=1)
        return self.columns.sum(lambda c: function(self.gradients(c)), max(1, CHUNK // largest))


def capture_batch(
    problem: Problem, kind: type[OutputCurvature], fallback: str | None
) -> CapturedBatch:
    """Captures the model of ``problem`` and chooses the columns of the curvature ``kind``.

    Raises:
      ValueError: where a parameter has a use without a layer rule, or examples meet, and there is
        no fallback.
    """
    layers = capture_of(problem)
    check_covered(layers, fallback)
    make_columns = lambda separate: columns_of(kind, problem, layers.z, separate)
    return CapturedBatch.of(layers, make_columns)


def captured_rows(
    problem: Problem, make_columns: Callable[[tuple[int, ...]], Columns]
) -> tuple[CapturedBatch, bool]:
    """The captured batch of ``problem``, and whether its rows still hold their mean.

    A mean over the examples that the model takes out would make them meet: it is left in, for
    `fvp.layers.columns.less_mean` to take out of the rows.
    """
    captured = CapturedBatch.of(capture_of(problem.before_centering()), make_columns)
    if problem.uncentered is None or not captured.separate:
        return captured, problem.uncentered is not None
    return CapturedBatch.of(capture_of(problem), make_columns), False


def capture_of(problem: Problem) -> Capture:
    """The layers of the model of ``problem``."""
    batch_axes = problem.batch_axes
    return capture(problem.model, problem.head, problem.params, problem.batch, batch_axes)


def _present(x: Array, shares: Float[Array, " E"], axis: int = 0) -> Array:
    """``x`` with zeros for the examples of weight zero, along ``axis``, whatever they hold."""
    if shares.size == 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where((shares == 0).reshape(-1, *(1,) * (x.ndim - axis - 1)), 0, widen(x))
