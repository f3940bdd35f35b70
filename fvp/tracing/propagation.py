"""Where the example axis is: followed through a jaxpr, until examples meet.

A value that does not depend on the batch has the place None. A :class:`Place` promises that each
entry depends on one example only, and says on which. :class:`Mixed` promises nothing and names the
primitive where examples met, or that no rule follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from fvp.compatibility import JIT, ClosedJaxpr, scan_counts
from fvp.tracing.batch_axis_rules import ELEMENTWISE, RULES, AnyPlace, Mixed, Place, join

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


def propagate(eqn: Any, places: Sequence[AnyPlace], count: int) -> list[AnyPlace]:
    """The places of the outputs of ``eqn`` from those of its inputs, for ``count`` examples."""
    name, outputs = eqn.primitive.name, len(eqn.outvars)
    if all(place is None for place in places):
        return [None] * outputs
    if (nested := _nested(eqn, places, count)) is not None:
        return nested
    for place in places:
        if isinstance(place, Mixed):
            return [place] * outputs
    # Inside a step that is one example's own nothing can mix.
    if name in ELEMENTWISE or any(place.dim < 0 for place in places if isinstance(place, Place)):
        joined: AnyPlace = None
        for place in places:
            joined = join(joined, place, name)
        return [joined] * outputs
    rule = RULES.get(name)
    out = rule(eqn, places, count) if rule else None
    return [Mixed(name, name in RULES) if out is None else out] * outputs


def jaxpr_places(jaxpr: Any, places: Sequence[AnyPlace], count: int) -> list[AnyPlace]:
    """The places of the outputs of a jaxpr from those of its inputs."""
    env: dict[Any, AnyPlace] = dict(zip(jaxpr.invars, places, strict=True))
    read = lambda atom: None if isinstance(atom, Literal) else env.get(atom)
    for eqn in jaxpr.eqns:
        out = propagate(eqn, [read(atom) for atom in eqn.invars], count)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def inner_jaxpr(eqn: Any) -> Any:
    """The closed jaxpr that a call-like equation runs, or None."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name not in CALLS or jaxpr is None:
        return None
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def scan_carry(eqn: Any, places: Sequence[AnyPlace], count: int) -> list[AnyPlace]:
    """The places of the inputs of a scan's body: those of its carry are a fixed point."""
    consts, carried = scan_counts(eqn)
    entered = [_deeper(place) for place in places[: consts + carried]]
    fixed, carry = entered[:consts], entered[consts:]
    rows = [_inside(place) for place in places[consts + carried :]]
    while True:
        body = eqn.params["jaxpr"].jaxpr
        out = jaxpr_places(body, [*fixed, *carry, *rows], count)[:carried]
        # What is carried on from an example's own step meets the next one.
        out = [Mixed("scan") if isinstance(p, Place) and p.dim == -1 else p for p in out]
        new = [join(a, b, "scan") for a, b in zip(carry, out, strict=True)]
        if new == carry:
            return [*fixed, *carry, *rows]
        carry = new


def _inside(place: AnyPlace) -> AnyPlace:
    """The place of one slice of what a scan runs over."""
    return Place(place.dim - 1, place.inner) if isinstance(place, Place) else place


def outside(place: AnyPlace) -> AnyPlace:
    """The place of a scan's stacked output from that of one of its slices."""
    return Place(place.dim + 1, place.inner) if isinstance(place, Place) else place


def _deeper(place: AnyPlace) -> AnyPlace:
    """The place inside a scan of what all its steps see."""
    return _inside(place) if isinstance(place, Place) and place.dim < 0 else place


def leave_carry(place: AnyPlace) -> AnyPlace:
    """The place outside of a scan of what it carried."""
    return outside(place) if isinstance(place, Place) and place.dim < 0 else place


def _nested(eqn: Any, places: Sequence[AnyPlace], count: int) -> list[AnyPlace] | None:
    """The places of what an equation with jaxprs of its own returns, where there is a rule."""
    name = eqn.primitive.name
    if (inner := inner_jaxpr(eqn)) is not None:
        return jaxpr_places(inner.jaxpr, places, count)
    if name == "scan":
        inputs = scan_carry(eqn, places, count)
        out = jaxpr_places(eqn.params["jaxpr"].jaxpr, inputs, count)
        consts, carried = scan_counts(eqn)
        last = map(leave_carry, inputs[consts : consts + carried])
        return [*last, *map(outside, out[carried:])]
    if name == "custom_linear_solve":
        lengths, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
        start = lengths.matvec + lengths.vecmat
        constants = places[start : start + lengths.solve]
        return jaxpr_places(solve.jaxpr, [*constants, *places[sum(lengths) :]], count)
    if name == "cond" and places[0] is None:
        runs = [jaxpr_places(b.jaxpr, places[1:], count) for b in eqn.params["branches"]]
        joined = runs[0]
        for run in runs[1:]:
            joined = [join(a, b, name) for a, b in zip(joined, run, strict=True)]
        return joined
    return None
