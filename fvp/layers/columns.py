"""Cotangents in the space of outputs whose outer products sum to the output curvature.

A curvature is sum_k J^T c_k c_k^T J over columns c_k. Where the model keeps its rows apart, one
column serves all of them at once; where rows meet, each row has columns of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fvp.curvature import OutputCurvature, Problem
from fvp.curvature.problem import apply_weights, mask_outputs
from fvp.heads import Root
from fvp.numerics import scan_sum


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one batch; lives inside one trace.

    Attributes:
      number: how many there are.
      shares: w_i / sum w over the batch axes of z.
      make: index -> the column, an array like z.
    """

    number: int
    shares: Array
    make: Callable[[Any], Array]

    def all(self) -> Array:
        """(K, like z)."""
        return jax.vmap(self.make)(jnp.arange(self.number))

    def sum(self, function: Callable[[Array], Any], size: int) -> Any:
        """The sum over chunks of ``size`` columns of ``function(columns)``."""
        if self.number <= size:
            return function(self.all())
        indices = jnp.arange(-(-self.number // size) * size).reshape(-1, size)

        def chunk(indices: Array) -> Any:
            columns = jax.vmap(self.make)(indices)
            beyond = (indices >= self.number).reshape(-1, *(1,) * (columns.ndim - 1))
            return function(jnp.where(beyond, 0, columns))

        return scan_sum(chunk, indices)


def check_not_negative(weights: Any) -> None:
    """Raises for negative weights where their values are known: their square roots are none."""
    if weights is None or isinstance(weights, Tracer):
        return
    if np.min(np.asarray(weights), initial=0) < 0:
        raise ValueError(
            "weights: fisher_diagonal, kfac, solve_dual, laplace and influence expect 0 or"
            " more, got"
            f" {np.min(np.asarray(weights))}; products and fvp.cg take negative ones."
        )


def columns_of(
    kind: type[OutputCurvature], problem: Problem, z: Array, separate: Sequence[int]
) -> Columns:
    """The columns of the mean curvature of ``kind`` at the outputs ``z``.

    ``separate`` are the batch axes along which every row has columns of its own. Independent
    columns of mean zero need none: rows that share one do not meet in expectation.
    """
    event_ndim, weights = problem.head.event_ndim, problem.example_weights(z)
    curvature = kind.at(problem, mask_outputs(weights, event_ndim, z))
    root = curvature.root()
    if root is None:
        raise TypeError(f"no root is known for {curvature}")
    axes = () if root.independent else separate
    return separated(root, shares_of(problem, z), axes, event_ndim)


def shares_of(problem: Problem, z: Array) -> Array:
    """w_i / sum w over the batch axes of the outputs ``z``."""
    total, weights = problem.total_weight(z), problem.example_weights(z)
    if weights is None:
        weights = jnp.ones(problem.head.batch_shape(z), total.dtype)
    return weights / total


def less_mean(rows: Array, shares: Array, axis: int) -> Array:
    """sqrt(s_e) (a_e - sum_f s_f a_f), of the rows sqrt(s_e) a_e along ``axis``, for shares s."""
    shares = shares.reshape(-1, *(1,) * (rows.ndim - axis - 1)).astype(rows.dtype)
    scale = jnp.sqrt(jnp.abs(shares))
    mean = jnp.sum(jnp.sign(shares) * scale * rows, axis=axis, keepdims=True)
    return rows - scale * mean


def score_coefficients(root: Root, shares: Array, targets: Any) -> Array | None:
    """Of the gradient of the mean loss at ``targets`` in the weighted columns of ``root``.

    (batch axes, K); None where it is not known. Zero where the root has no digits left.
    """
    if targets is None or root.score is None:
        return None
    return apply_weights(jnp.sqrt(shares), 1, root.score(targets))


def separated(root: Root, shares: Array, separate: Sequence[int], event_ndim: int) -> Columns:
    """The columns of ``root``, weighted, one copy for each row along the axes ``separate``."""
    counts = shares.shape
    shape = tuple(counts[axis] for axis in separate)
    scale = jnp.sqrt(shares).reshape(*counts, *(1,) * event_ndim)

    def make(index: Any) -> Array:
        # A row of weight zero is not there, whatever it holds.
        column = jnp.where(scale == 0, 0, scale * root.column(index % root.size))
        row = jnp.unravel_index(index // root.size, shape) if shape else ()
        for axis, position in zip(separate, row, strict=True):
            here = jnp.arange(counts[axis]) == position
            column = jnp.where(here.reshape(-1, *(1,) * (column.ndim - axis - 1)), column, 0)
        return column

    return Columns(math.prod(shape) * root.size, shares, make)
