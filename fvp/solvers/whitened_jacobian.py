"""The Jacobian times the root of the output curvature: A, F = A^T A, and A A^T by layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import CurvatureOperator
from fvp.curvature.linearization import Linearization
from fvp.layers.captured_batch import CapturedBatch, captured_rows
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import less_mean, score_coefficients, separated, shares_of
from fvp.layers.dense import MOST_ENTRIES, gradient_rows
from fvp.layers.gram import gram_matrix
from fvp.numerics import cast_like, widen, widen_tree


@dataclasses.dataclass(frozen=True)
class WhitenedJacobian:
    """A with F = A^T A, a row for each column of the root of H and example; inside one trace."""

    operator: CurvatureOperator
    captured: CapturedBatch
    columns: Array  # (K, like z), weighted
    centered: bool  # whether the mean row has to be taken out of the captured ones

    @classmethod
    def of(cls, operator: CurvatureOperator) -> Self:
        """That of an ``operator`` whose output curvature has a root."""
        problem, root = operator.problem, operator.linearized.root()
        assert problem is not None
        assert root is not None
        shares = shares_of(problem, operator.linearized.output)
        make = lambda separate: separated(root, shares, separate, problem.head.event_ndim)
        captured, centered = captured_rows(problem, make)
        return cls(operator, captured, captured.columns.all(), centered)

    def times(self, v: Any) -> Array:
        """A v, of shape (K, E)."""
        v = cast_like(v, self.operator.like)
        return self.images(self._model.jvp(v))

    def images(self, u: Array) -> Array:
        """A v where J v = ``u``, of shape (K, E)."""
        u = widen(u)
        _, others = self._axes()
        dots = jnp.sum(self.columns * u, axis=tuple(1 + d for d in others))
        return dots.reshape(self.columns.shape[0], -1)

    def transposed(self, w: Array) -> Any:
        """A^T w, in float32 or wider."""
        output = self.operator.linearized.output
        u = jnp.sum(self.columns * self._spread(w), axis=0).astype(output.dtype)
        return widen_tree(self._model.vjp(u))

    def gram(self) -> Array:
        """A A^T, (K E, K E)."""
        unmatched = self.captured.unmatched
        gram = gram_matrix(self.captured, self._plain_rows if unmatched else None)
        if not self.centered:
            return gram
        sides = (self.columns.shape[0], self._examples()) * 2
        gram = gram.reshape(sides)
        for axis in (1, 3):
            gram = less_mean(gram, self.captured.shares, axis)
        return gram.reshape(math.prod(sides[:2]), -1)

    def has_rows(self) -> bool:
        """Whether `rows` are to be had, and fit into memory."""
        parameters = sum(s.size for s in jax.tree.leaves(self.operator.like))
        entries = self.columns.shape[0] * self._examples() * parameters
        plain = not self.captured.unmatched and not self.captured.separate
        return plain and entries <= MOST_ENTRIES

    def gram_forms_rows(self) -> bool:
        """Whether most of A A^T comes from rows: of parameters that are used more than once."""
        sizes = [math.prod(shape.shape) for shape in self.captured.layers.shapes]
        uses = self.captured.layers.uses
        several = {uses[group[0]].view.leaf for group in self.captured.groups if len(group) > 1}
        return 2 * sum(sizes[leaf] for leaf in several) > sum(sizes)

    def rows(self) -> Array:
        """A, (K E, P), by layers."""
        rows = gradient_rows(self.captured, self.columns)
        rows = less_mean(rows, self.captured.shares, 1) if self.centered else rows
        return rows.reshape(-1, rows.shape[-1])

    def coefficients(self, targets: Any) -> Array | None:
        """The w with A^T w = the gradient of the loss at ``targets``; None where it is not known.

        Up to entries where the root has no digits left, which are zero.
        """
        root, shares = self.operator.linearized.root(), self.captured.columns.shares
        assert root is not None
        event = score_coefficients(root, shares, targets)
        if event is None:
            return None
        # The coefficient of a column is the entry of w where the unit vector behind it was one.
        separate, size = self.captured.separate, event.shape[-1]
        order = [*separate, shares.ndim, *self.captured.layers.examples]
        rest = [axis for axis in range(event.ndim) if axis not in order]  # of length one
        return event.transpose(*order, *rest).reshape(-1 if separate else size, self._examples())

    @property
    def _model(self) -> Linearization:
        jacobian = self.operator.linearized.jacobian
        assert jacobian is not None
        return jacobian

    def _examples(self) -> int:
        return self.captured.shares.size

    def _axes(self) -> tuple[list[int], list[int]]:
        examples = list(self.captured.layers.examples)
        others = [d for d in range(self.operator.linearized.output.ndim) if d not in examples]
        return examples, others

    def _spread(self, w: Array) -> Array:
        examples, _ = self._axes()
        shape = [size if d in examples else 1 for d, size in enumerate(self.columns.shape[1:])]
        return w.reshape(-1, *shape)

    def _plain_rows(self, columns: Array) -> Array:
        """(K, E, entries of the unmatched leaves), by one backward pass for each row."""
        examples = self._examples()

        def row(index: Array) -> Array:
            unit = (jnp.arange(columns.shape[0] * examples) == index).astype(columns.dtype)
            w = unit.reshape(columns.shape[0], examples)
            u = jnp.sum(columns * self._spread(w), axis=0).astype(
                self.operator.linearized.output.dtype
            )
            leaves = jax.tree.leaves(self._model.vjp(u))
            return jnp.concatenate([widen(leaves[i]).ravel() for i in self.captured.unmatched])

        count = columns.shape[0] * examples
        size = max(1, CHUNK // sum(s.size for s in jax.tree.leaves(self.operator.like)))
        rows = jax.lax.map(row, jnp.arange(count), batch_size=min(size, count))
        return rows.reshape(columns.shape[0], examples, -1)
