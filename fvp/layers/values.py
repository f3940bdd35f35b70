"""A value on its way through a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from fvp.layers.place_rules import AnyPlace, Place
from fvp.layers.uses import Use
from fvp.layers.views import View


@dataclasses.dataclass(eq=False)
class Value:
    """An array and what is known about it.

    Attributes:
      x: the array or tracer.
      places: where each batch axis is.
      view: the parameter that it is, or None.
      trained: whether it was computed from parameters.
      source: a use whose output this is, unread by anything else, and where its features are.
    """

    x: Any
    places: tuple[AnyPlace, ...]
    view: View | None = None
    trained: bool = False
    source: tuple[Use, tuple[Place, ...]] | None = None

    @property
    def constant(self) -> bool:
        """Whether neither parameters nor batch enter."""
        return not self.trained and all(place is None for place in self.places)
