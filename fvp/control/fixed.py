"""Damping that the user gives: a number or a schedule."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FixedDamping:
    """A number, or a schedule of the step count. Nothing is tried and nothing is adapted."""

    value: Any

    def at(self, count: Any) -> Any:
        """The damping at the step ``count``."""
        return self.value(count) if callable(self.value) else self.value
