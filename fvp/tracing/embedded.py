"""Uses of a parameter that is part of the weight: of one that was concatenated, stacked or padded.

Such a use reads the inputs and outputs that meet the parameter, and no others.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.tracing.steps import Shape
from fvp.tracing.uses import ParameterUse


def restrict(use: ParameterUse, shape: Shape) -> None:
    """Makes ``use``, of a leaf of ``shape``, one of that leaf alone.

    It is ``scattered`` where the leaf is no block of the weight, and then reads the whole weight's
    inputs and outputs. Its kind becomes "nothing" if it reads none of the leaf.
    """
    if use.kind == "other" or not use.view.embedded or use.view.functions:
        return
    present = use.layout.entries(shape) >= 0
    if not present.any():
        use.kind = "nothing"
        return
    kept = [np.flatnonzero(present.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not present[np.ix_(*kept)].all():
        use.scattered = True
        return
    whole, stacks = use.layout.whole, use.layout.stacks
    if len(kept[0]) < whole[0] and stacks:
        use.scattered = True  # groups of scans come in one by one
        return
    use.kept = tuple(tuple(numbers.tolist()) for numbers in kept)
    groups = slice(None) if len(kept[0]) == whole[0] else kept[0]
    read_input, read_output = use.read_input, use.read_output
    pick = lambda x, features: x[..., groups, :][..., features]
    use.read_output = lambda y: pick(read_output(y), kept[2])
    if use.kind == "lookup":
        use.read_input = lambda x: _renumbered(read_input(x), kept[1], whole[1])
    elif not use.is_elementwise:
        use.read_input = lambda x: pick(read_input(x), kept[1])


def _renumbered(numbers: Array, kept: np.ndarray, size: int) -> Array:
    """Numbers of inputs among those ``kept`` of ``size``; one past the last for all others."""
    renumbered = np.full(size + 1, len(kept))
    renumbered[kept] = np.arange(len(kept))
    return jnp.asarray(renumbered)[numbers]
