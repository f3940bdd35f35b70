"""The batch axes that are example axes, and arrays of a use in the layout (E, R, G, ...)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fvp.tracing.batch_axes import BatchAxis, Mixed
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Value


@dataclasses.dataclass(frozen=True)
class ExampleAxes:
    """The batch axes of z along which the model keeps examples apart.

    Attributes:
      counts: the lengths of the batch axes of z.
      kept: those that are example axes; E is the product of their lengths.
      mixed: where examples met along the first batch axis, or None.
    """

    counts: tuple[int, ...]
    kept: tuple[int, ...]
    mixed: Mixed | None

    @classmethod
    def of(cls, z: Value, uses: Sequence[ParameterUse], counts: Sequence[int]) -> ExampleAxes:
        """Of a model with output ``z`` and these uses of parameters."""
        layers = [use for use in uses if use.is_layer and not use.scattered]
        kept: list[int] = []
        for axis, count in enumerate(counts):
            found = z.batch_axes[axis]
            apart = count == 1 or found is None or found == BatchAxis(axis)
            if axis and not all(_among_shared(use, axis) for use in layers):
                apart = False
            if apart and (axis == 0 or kept):
                kept.append(axis)
        if counts[0] == 1 or 0 in kept:
            # One example needs no axis: everything that happens is within it.
            kept = [axis for axis in kept if counts[axis] > 1]
            return cls(tuple(counts), tuple(kept), None)
        found = z.batch_axes[0]
        mixed = found if isinstance(found, Mixed) else Mixed("the model's output")
        return cls(tuple(counts), (), mixed)

    @property
    def number(self) -> int:
        """The number of examples, E."""
        return math.prod(self.counts[axis] for axis in self.kept)

    def handles(self, use: ParameterUse) -> bool:
        """Whether there is a rule for ``use`` that keeps all examples apart."""
        return use.is_layer and all(_among_shared(use, axis) is not None for axis in self.kept)

    def arrange(
        self, use: ParameterUse, read: Callable[[Array], Array], x: Array, trailing: int
    ) -> Array:
        """``read`` of every scan step, as (E, R, G, ...): ``trailing`` axes, groups first."""
        for _ in use.scans:
            read = jax.vmap(read)
        x = read(x)
        shared = [i for i, (kind, _) in enumerate(use.scans) if kind == "shared"]
        stacked = [i for i, (kind, _) in enumerate(use.scans) if kind == "stacked"]
        # Scans that share the weight are rows, those over slices of it are the slowest groups.
        first, last = len(use.scans), x.ndim - trailing
        x = x.transpose(*shared, *range(first, last), *stacked, *range(last, x.ndim))
        outer = len(shared) + len(use.shared_axes)
        groups = x.shape[outer : outer + len(stacked) + 1]
        rest = x.shape[outer + len(stacked) + 1 :]
        dims = [*(i - len(use.scans) for i in shared), *use.shared_axes]
        shape, where = self._split(use, x.shape[:outer], dims)
        x = x.reshape(*shape, math.prod(groups), *rest)
        front = [where[axis] for axis in self.kept]
        rows = [d for d in range(len(shape)) if d not in front]
        x = x.transpose(*front, *rows, *range(len(shape), x.ndim))
        if not self.holds_all(use):
            x = jnp.pad(x, [*self._absent(use), *((0, 0) for _ in x.shape[len(front) :])])
        return x.reshape(self.number, -1, *x.shape[len(shape) :])

    def _absent(self, use: ParameterUse) -> list[tuple[int, int]]:
        """Numbers of examples before and after those that a use is of, along each example axis."""
        absent = []
        for axis in self.kept:
            batch, count = _among_shared(use, axis), self.counts[axis]
            start, length = (0, count) if batch is None else batch.stretch(count)
            absent.append((start, count - start - length))
        return absent

    def holds_all(self, use: ParameterUse) -> bool:
        """Whether a use is of all examples."""
        return not any(map(any, self._absent(use)))

    def _split(
        self, use: ParameterUse, sizes: Sequence[int], dims: Sequence[int]
    ) -> tuple[list[int], dict[int, int]]:
        """Axes of lengths ``sizes`` cut into example axes and rest; and where the former are.

        ``dims`` are the numbers of these axes in the terms of `BatchAxis`.
        """
        shape: list[int] = []
        where: dict[int, int] = {}
        found = [(_among_shared(use, axis), axis) for axis in self.kept]
        for size, dim in zip(sizes, dims, strict=True):
            here = [
                (batch.inner, axis, batch.stretch(self.counts[axis]).length)
                for batch, axis in found
                if batch and batch.dim == dim
            ]
            for inner, axis, length in sorted(here, reverse=True):
                shape.append(size // (length * inner))
                where[axis] = len(shape)
                shape.append(length)
                size = inner
            shape.append(size)
        return shape, where


def _among_shared(use: ParameterUse, axis: int) -> BatchAxis | None:
    """Where a batch axis of z is among the shared axes of a use; None if it is not."""
    found = use.batch_axes[axis]
    if not isinstance(found, BatchAxis):
        return None
    if found.dim < 0:
        return found if use.scans[found.dim][0] == "shared" else None
    return found if found.dim in use.shared_axes else None
