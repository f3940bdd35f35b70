"""What tracing asks of equations: their inner programs, and where operands are read in an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from fvp.compatibility import JIT, ClosedJaxpr

#: A ``jax.extend.core.JaxprEqn``; to a type checker its abstract values have no shapes.
Equation: TypeAlias = Any

#: A ``jax.extend.core.Jaxpr``.
Jaxpr: TypeAlias = Any

CALLS = frozenset(
    (
        *JIT,
        "closed_call",
        "core_call",
        "remat2",
        "checkpoint",
        "composite",
        "custom_jvp_call",
        "custom_vjp_call",
    )
)


def inner_jaxpr(eqn: Equation) -> Any:
    """The closed jaxpr that a call-like equation runs, or None."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name not in CALLS or jaxpr is None:
        return None
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def free_dimensions(eqn: Equation) -> tuple[list[int], list[int]]:
    """For both operands of a ``dot_general`` the axes neither contracted nor batched, in order."""
    contract, batch = eqn.params["dimension_numbers"]
    free = []
    for side, var in enumerate(eqn.invars):
        taken = (*contract[side], *batch[side])
        free.append([d for d in range(var.aval.ndim) if d not in taken])
    return free[0], free[1]


def reshape_order(eqn: Equation) -> Sequence[int] | None:
    """The order that ``lax.reshape`` reads the axes of its operand in, where it is not theirs."""
    return eqn.params["dimensions"] if eqn.primitive.name == "reshape" else None
