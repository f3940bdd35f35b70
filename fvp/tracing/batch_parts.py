"""Batches whose leaves hold parts of it: interior and boundary points, joined by the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal

from fvp.tracing.batch_axes import Part
from fvp.tracing.jaxprs import Equation, Jaxpr, inner_jaxpr

Leaves = frozenset[int]  # numbers of inputs


class _Piece(NamedTuple):
    """An operand of what is as long as the batch, and the inputs that it reads."""

    part: Part
    leaves: Leaves


def parts_of(jaxpr: Jaxpr, lengths: Sequence[int | None], count: int) -> list[Part | None]:
    """Which of the ``count`` examples each input holds, ``lengths`` of them or None.

    Those of the piece of its length that reads it and the least besides. It is no more than a
    guess: on the way to the output every entry is followed, and if it was wrong, examples are found
    to meet.
    """
    pieces: list[_Piece] = []
    _follow(jaxpr, [frozenset([i]) for i in range(len(jaxpr.invars))], count, pieces)
    found: list[Part | None] = []
    for number, length in enumerate(lengths):
        fits = [p for p in pieces if number in p.leaves and p.part.length == length]
        least = min((len(p.leaves) for p in fits), default=0)
        parts = {p.part for p in fits if len(p.leaves) == least}
        found.append(parts.pop() if len(parts) == 1 else None)
    return found


def _follow(
    jaxpr: Jaxpr, inputs: Sequence[Leaves], count: int, pieces: list[_Piece]
) -> list[Leaves]:
    """The inputs that the outputs of ``jaxpr`` read; adds to the pieces."""
    env: dict[Any, Leaves] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: frozenset() if isinstance(atom, Literal) else env.get(atom, frozenset())
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if (inner := inner_jaxpr(eqn)) is not None:
            outputs = _follow(inner.jaxpr, operands, count, pieces)
        else:
            pieces += _pieces(eqn, operands, count)
            outputs = [frozenset().union(*operands)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _pieces(eqn: Equation, operands: Sequence[Leaves], count: int) -> list[_Piece]:
    """The operands of an equation that puts together what is ``count`` long."""
    shapes = [atom.aval.shape for atom in eqn.invars]
    if eqn.primitive.name == "concatenate":
        sizes = [shape[eqn.params["dimension"]] for shape in shapes]
        if sum(sizes) != count:
            return []
        parts = [Part(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
        return [_Piece(*pair) for pair in zip(parts, operands, strict=True)]
    if eqn.primitive.name == "pad":
        padded = zip(shapes[0], eqn.params["padding_config"], strict=True)
        starts = {Part(low, n) for n, (low, high, _) in padded if n != count == low + n + high}
        return [_Piece(part, operands[0]) for part in starts]
    return []
