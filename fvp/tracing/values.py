"""A value on its way through a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from fvp.tracing.batch_axis_rules import AnyPlace, Place
from fvp.tracing.parameter_views import View
from fvp.tracing.uses import Use


@dataclasses.dataclass(eq=False)
class Value:
    """An array and what is known about it.

    Attributes:
      x: the array or tracer.
      places: where each batch axis is.
      views: how it depends on parameters, where it does not depend on the batch: its derivative is
        the sum of theirs.
      source: a use whose output this is, unread by anything else, and where its features are.
      level: 0 where ``x`` is known outside of all scans and branches, else how deep inside.
      node: how it was computed, where the batch had no part in it.
      slices: of a slice that a scan makes of a value of level 0, that value.
    """

    x: Any
    places: tuple[AnyPlace, ...]
    views: tuple[View, ...] = ()
    source: tuple[Use, tuple[Place, ...]] | None = None
    level: int = 0
    node: Node | None = None
    slices: Any = None

    @property
    def free(self) -> bool:
        """Whether the batch has no part in it."""
        return all(place is None for place in self.places)

    @property
    def constant(self) -> bool:
        """Whether neither parameters nor batch enter, and it is known outside of all scans."""
        return self.free and not self.views and self.level == 0

    @property
    def point(self) -> Any:
        """The value, or all slices that it is one of, as known outside of all scans; or None."""
        return self.x if self.level == 0 else self.slices


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """Output number ``output`` of an equation; ``serial`` orders the equations of a program."""

    equation: Any
    inputs: list[Value]
    output: int
    serial: int


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A use, and what was recorded of its other operand.

    ``active`` is 1 where the branch of a conditional that it stands in was taken, else 0, on the
    axes of the scans around it; None outside of conditionals.
    """

    use: Use
    operand: Any
    active: Any = None
