"""Evaluating the equations of a jaxpr one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of ``equation`` for other operands, in the context that it was traced in."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Up to jax 0.10.0 the functions come apart from the other parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]
