"""How much a function multiplies, by its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr

from fvp.compatibility import ClosedJaxpr
from fvp.tracing.jaxprs import Equation


def multiplications(function: Callable[..., Any], *args: Any) -> int:
    """Those of the matrix products and convolutions in one call; nothing is computed.

    A loop of unknown length counts once, of several branches the one with the most, and a kernel
    that was written by hand at most once.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args))


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Equation) -> int:
    name, inner = eqn.primitive.name, [_of_jaxpr(jaxpr) for jaxpr in _inner_jaxprs(eqn)]
    if name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted[0])
    if name == "conv_general_dilated":
        kernel, layout = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec
        return eqn.outvars[0].aval.size * kernel.size // max(1, kernel.shape[layout[0]])
    if name == "cond":
        return max(inner, default=0)
    return eqn.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _inner_jaxprs(eqn: Equation) -> Iterator[Any]:
    """Those that the equation runs; not the derivative rules beside them, which are functions."""
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(leaf):
            yield leaf


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, (Jaxpr, ClosedJaxpr))
