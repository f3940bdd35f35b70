"""Estimates run compiled when called eagerly, unless the operator is a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from fvp.compilation import compiled_when_eager

F = TypeVar("F", bound=Callable[..., Any])


def compiled_for_operators(function: F) -> F:
    """Decorator: ``function(operator, ...)``, compiled once for operators that are pytrees.

    A function may read state that changes between calls, so it is never compiled for later calls.
    """
    compiled = compiled_when_eager(function)

    @functools.wraps(function)
    def call(operator: Any, *args: Any) -> Any:
        opaque = any(callable(leaf) for leaf in jax.tree.leaves(operator))
        return (function if opaque else compiled)(operator, *args)

    return call  # pyright: ignore[reportReturnType]
