"""Where a batch axis of the output is in a value.

A `BatchAxis` promises that each entry of the value depends on one example only, and says on
which. `Mixed` promises nothing and names the primitive where examples met, or that no rule
follows. A value that does not depend on the batch has None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Part(NamedTuple):
    """Examples ``start`` to ``start + length`` of a batch."""

    start: int
    length: int


class BatchAxis(NamedTuple):
    """Entry i of axis ``dim`` belongs to example (i // inner) % count, or of a part of the batch.

    Inside of scans a negative ``dim`` is a scan whose steps are the entries: -1 is the innermost.
    """

    dim: int
    inner: int = 1
    part: Part | None = None

    def at(self, dim: int) -> BatchAxis:
        """The same where the axis is number ``dim``."""
        return self._replace(dim=dim)

    def stretch(self, count: int) -> Part:
        """The examples that it holds, of ``count`` in all."""
        return self.part or Part(0, count)

    def of(self, part: Part, count: int) -> BatchAxis | None:
        """The same for other examples; None where these are not among the ``count``."""
        if part.start < 0 or part.start + part.length > count:
            return None
        return self._replace(part=None if part == Part(0, count) else part)


class Mixed(NamedTuple):
    """Examples met at this primitive, or, where it is not ``ruled``, nothing is known of it."""

    primitive: str
    ruled: bool = True


AxisInfo: TypeAlias = BatchAxis | Mixed | None


def join(a: AxisInfo, b: AxisInfo, primitive: str) -> AxisInfo:
    """The batch axis of a value that reads ``a`` and ``b`` entry by entry."""
    if a is None or b is None or a == b:
        return b if a is None else a
    return next((p for p in (a, b) if isinstance(p, Mixed)), Mixed(primitive))


def join_all(axes: Sequence[AxisInfo], primitive: str) -> AxisInfo:
    """The batch axis of a value that reads all of ``axes`` entry by entry."""
    return functools.reduce(lambda a, b: join(a, b, primitive), axes, None)


def reshaped(
    axis: BatchAxis, old: Sequence[int], new: Sequence[int], count: int
) -> BatchAxis | None:
    """The batch axis after a row-major reshape; None where it is torn apart."""
    count = axis.stretch(count).length
    stride = axis.inner * math.prod(old[axis.dim + 1 :])
    below = 1
    for dim in reversed(range(len(new))):
        above = below * new[dim]
        if new[dim] > 1 and below <= stride < above:
            fits = stride % below == 0 and above % (stride * count) == 0
            return axis._replace(dim=dim, inner=stride // below) if fits else None
        below = above
    return None if count > 1 or not len(new) else axis._replace(dim=0, inner=1)
