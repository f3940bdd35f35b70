"""Names of the entries of a tree of parameters, in ``ravel_pytree`` order."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from fvp.typing import Params

_SHOWN = 6


def entry_names(params: Params, name: str = "params") -> list[str]:
    """One name for each number, such as ``params['w'][2, 0]``; a scalar leaf is its path alone."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = name + jax.tree_util.keystr(path)
        indices = np.ndindex(np.shape(leaf))
        names += [f"{where}{list(index)}" if index else where for index in indices]
    return names


def listed(names: Sequence[str]) -> str:
    """The first of the ``names``, and how many there are beside them."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
