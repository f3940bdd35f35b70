"""Running compiled when called eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])


def compiled_when_eager(function: F) -> F:
    """Decorator: jit ``function`` where nothing is being traced, inline it where something is.

    Inside a caller's own ``jit``, ``vmap`` or ``scan`` the function is part of that program; called
    eagerly it would run operation by operation. Arrays and floats anywhere in the arguments are
    data; functions, integers and other objects are part of the program and must be hashable. One
    compilation for each of those, so a Python loop over one model function compiles once.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def jitted(structure: Any, fixed: tuple[Any, ...], data: list[Any]) -> Any:
        leaves = [x if x is not None else y for x, y in zip(data, fixed, strict=True)]
        return function(*jax.tree.unflatten(structure, leaves))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(*args)
        fixed = tuple(None if _is_data(leaf) else leaf for leaf in leaves)
        return jitted(structure, fixed, [leaf if _is_data(leaf) else None for leaf in leaves])

    return call  # pyright: ignore[reportReturnType]


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float))
