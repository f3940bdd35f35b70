"""A batch axis followed through a jaxpr, until examples meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from fvp.compatibility import scan_counts
from fvp.tracing.batch_axes import AxisInfo, BatchAxis, Mixed, join, join_all
from fvp.tracing.batch_axis_rules import ELEMENTWISE, RULES
from fvp.tracing.jaxprs import Equation, Jaxpr, inner_jaxpr


def propagate(eqn: Equation, axes: Sequence[AxisInfo], count: int) -> list[AxisInfo]:
    """The batch axis, ``count`` long, in the outputs of ``eqn`` from ``axes``, in its inputs."""
    name, outputs = eqn.primitive.name, len(eqn.outvars)
    if all(axis is None for axis in axes):
        return [None] * outputs
    if (nested := _nested(eqn, axes, count)) is not None:
        return nested
    for axis in axes:
        if isinstance(axis, Mixed):
            return [axis] * outputs
    # Inside a step that is one example's own nothing can mix.
    if name in ELEMENTWISE or any(axis.dim < 0 for axis in axes if isinstance(axis, BatchAxis)):
        return [join_all(axes, name)] * outputs
    rule = RULES.get(name)
    out = rule(eqn, axes, count) if rule else None
    return [Mixed(name, name in RULES) if out is None else out] * outputs


def propagate_jaxpr(jaxpr: Jaxpr, axes: Sequence[AxisInfo], count: int) -> list[AxisInfo]:
    """The batch axis in the outputs of a jaxpr from ``axes``, in its inputs."""
    env: dict[Any, AxisInfo] = dict(zip(jaxpr.invars, axes, strict=True))
    read = lambda atom: None if isinstance(atom, Literal) else env.get(atom)
    for eqn in jaxpr.eqns:
        out = propagate(eqn, [read(atom) for atom in eqn.invars], count)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def scan_body_axes(eqn: Equation, axes: Sequence[AxisInfo], count: int) -> list[AxisInfo]:
    """The batch axis in the inputs of a scan's body: that of its carry is a fixed point."""
    consts, carried = scan_counts(eqn)
    entered = [_deeper(axis) for axis in axes[: consts + carried]]
    fixed, carry = entered[:consts], entered[consts:]
    scanned = [_inside(axis) for axis in axes[consts + carried :]]
    while True:
        body = eqn.params["jaxpr"].jaxpr
        out = propagate_jaxpr(body, [*fixed, *carry, *scanned], count)[:carried]
        # What is carried on from an example's own step meets the next one.
        out = [Mixed("scan") if isinstance(p, BatchAxis) and p.dim == -1 else p for p in out]
        new = [join(a, b, "scan") for a, b in zip(carry, out, strict=True)]
        if new == carry:
            return [*fixed, *carry, *scanned]
        carry = new


def _inside(axis: AxisInfo) -> AxisInfo:
    """The batch axis in one slice of what a scan runs over."""
    return axis.at(axis.dim - 1) if isinstance(axis, BatchAxis) else axis


def outside(axis: AxisInfo) -> AxisInfo:
    """The batch axis in a scan's stacked output from that in one of its slices."""
    return axis.at(axis.dim + 1) if isinstance(axis, BatchAxis) else axis


def _deeper(axis: AxisInfo) -> AxisInfo:
    """The batch axis, inside a scan, of what all its steps see."""
    return _inside(axis) if isinstance(axis, BatchAxis) and axis.dim < 0 else axis


def leave_carry(axis: AxisInfo) -> AxisInfo:
    """The batch axis, outside of a scan, of what it carried."""
    return outside(axis) if isinstance(axis, BatchAxis) and axis.dim < 0 else axis


def _nested(eqn: Equation, axes: Sequence[AxisInfo], count: int) -> list[AxisInfo] | None:
    """The batch axis in what an equation with inner jaxprs returns, where there is a rule."""
    name = eqn.primitive.name
    if (inner := inner_jaxpr(eqn)) is not None:
        return propagate_jaxpr(inner.jaxpr, axes, count)
    if name == "scan":
        inputs = scan_body_axes(eqn, axes, count)
        out = propagate_jaxpr(eqn.params["jaxpr"].jaxpr, inputs, count)
        consts, carried = scan_counts(eqn)
        last = map(leave_carry, inputs[consts : consts + carried])
        return [*last, *map(outside, out[carried:])]
    if name == "custom_linear_solve":
        lengths, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
        start = lengths.matvec + lengths.vecmat
        constants = axes[start : start + lengths.solve]
        return propagate_jaxpr(solve.jaxpr, [*constants, *axes[sum(lengths) :]], count)
    if name == "cond" and axes[0] is None:
        runs = [propagate_jaxpr(b.jaxpr, axes[1:], count) for b in eqn.params["branches"]]
        joined = runs[0]
        for run in runs[1:]:
            joined = [join(a, b, name) for a, b in zip(joined, run, strict=True)]
        return joined
    return None
