"""A value on its way through a model."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from jax import Array

from fvp.tracing.batch_axes import AxisInfo, BatchAxis
from fvp.tracing.jaxprs import Equation
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.uses import ParameterUse

#: A use whose output a value is, and where the features of that output are in it.
Source: TypeAlias = tuple[ParameterUse, tuple[BatchAxis, ...]]


@dataclasses.dataclass(eq=False)
class Value:
    """An array and what is known about it.

    Attributes:
      x: the array or tracer.
      batch_axes: where each batch axis of the model's output is in it.
      views: how it depends on parameters, where it does not depend on the batch: its derivative is
        the sum of theirs.
      source: where the value is the output of a use, moved or not, and nothing else reads it.
      level: 0 where ``x`` is known outside of all scans and branches, else how deep inside.
      node: how it was computed, where the batch had no part in it.
      slices: of a slice that a scan makes of a value of level 0, that value.
    """

    x: Array
    batch_axes: tuple[AxisInfo, ...]
    views: tuple[ParameterView, ...] = ()
    source: Source | None = None
    level: int = 0
    node: Node | None = None
    slices: Array | None = None

    @property
    def free(self) -> bool:
        """Whether the batch has no part in it."""
        return all(axis is None for axis in self.batch_axes)

    @property
    def constant(self) -> bool:
        """Whether neither parameters nor batch enter, and it is known outside of all scans."""
        return self.free and not self.views and self.level == 0

    @property
    def point(self) -> Array | None:
        """The value, or all slices that it is one of, as known outside of all scans; or None."""
        return self.x if self.level == 0 else self.slices


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """Output number ``output`` of an equation; ``serial`` orders the equations of a program."""

    equation: Equation
    inputs: list[Value]
    output: int
    serial: int


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A use, and what was recorded of its other operand.

    ``active`` is 1 where the branch of a conditional that it stands in was taken, else 0, on the
    axes of the scans around it; None outside of conditionals.
    """

    use: ParameterUse
    operand: Any
    active: Array | None = None
