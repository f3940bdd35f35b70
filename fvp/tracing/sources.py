"""Which layer a bias belongs to: the use whose output it shifts, where nothing else reads that."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fvp.tracing.batch_axes import BatchAxis
from fvp.tracing.jaxprs import Equation
from fvp.tracing.propagation import propagate
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Source, Value

_MOVES = frozenset(
    ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "name")
)


def source_of(use: ParameterUse) -> Source:
    """The source of the output of a use: its features are followed as batch axes are."""
    return use, tuple(BatchAxis(d) for d in use.features if use.shape[d] > 1)


def moved(eqn: Equation, source: Source | None) -> Source | None:
    """The source of a rearranged output, where its features stay whole."""
    if source is None or eqn.primitive.name not in _MOVES:
        return None
    use, features = source
    sizes = [use.shape[d] for d in use.features if use.shape[d] > 1]
    found = [propagate(eqn, [f], n)[0] for f, n in zip(features, sizes, strict=True)]
    whole = tuple(f for f in found if isinstance(f, BatchAxis))
    return (use, whole) if len(whole) == len(found) else None


def recorded_operand(use: ParameterUse, operand: Value) -> Any:
    """What is recorded of the other operand of a use; a shift notes the use that it belongs to."""
    if use.kind == "shift":
        if jnp.shape(operand.x) == use.shape:
            use.joined = _shifted(use, operand.source)
        return ()
    x = jnp.asarray(operand.x)
    return use.read_input(x) if use.kind == "scale" else x


def _shifted(use: ParameterUse, source: Source | None) -> ParameterUse | None:
    """The use that a shift belongs to: it shifts exactly the features of that use's output."""
    return source[0] if source is not None and source[1] == source_of(use)[1] else None
