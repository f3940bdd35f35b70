"""Scans and conditionals: taps go in, records come out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fvp.compatibility import scan_counts
from fvp.tracing.derived import derived
from fvp.tracing.parameter_views import View
from fvp.tracing.propagation import jaxpr_places, leave_carry, outside, scan_carry
from fvp.tracing.values import Record, Value


def scan(parent: Any, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Evaluates a scan: a parameter is shared by its steps, or stacked along the scanned axis."""
    p = eqn.params
    consts, carried = scan_counts(eqn)
    columns = [
        scan_carry(eqn, [value.places[i] for value in inputs], count)
        for i, count in enumerate(parent.counts)
    ]
    places = list(zip(*columns, strict=True)) if columns else [()] * len(inputs)
    inputs, row_places = list(map(_outlasting, inputs)), places[consts + carried :]
    for i in range(consts, consts + carried):
        if inputs[i].views:  # an initial state
            before = tuple(leave_carry(place) for place in places[i])
            inputs[i] = parent.materialize(inputs[i], "scan", before)
    slices = [_slices(parent, value) for value in inputs[consts + carried :]]
    seen: list[Record] = []

    def body(carry: Any, scanned: Any) -> Any:
        rows, taps = scanned
        child = type(parent)(parent.counts, taps, parent.level + 1)
        values = [
            dataclasses.replace(value, places=place, source=None)
            for value, place in zip(inputs[:consts], places, strict=False)
        ]
        values += [
            Value(x, place, level=child.level)
            for x, place in zip(carry, places[consts : consts + carried], strict=True)
        ]
        values += [
            Value(x, place, views, level=child.level, slices=whole)
            for x, place, (views, whole) in zip(rows, row_places, slices, strict=True)
        ]
        out = child.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, values)
        after = [*places[consts : consts + carried], *(value.places for value in out[carried:])]
        out = [_ended(child, "scan", *pair) for pair in zip(out, after, strict=True)]
        seen[:] = child.records
        recorded = [(record.operand, record.active) for record in child.records]
        result = [value.x for value in out]
        return result[:carried], (result[carried:], recorded)

    init = [value.x for value in inputs[consts : consts + carried]]
    rows = [value.x for value in inputs[consts + carried :]]
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    jax.eval_shape(lambda c, r: body(c, (r, None)), init, first)
    taps = parent.take_taps(seen)
    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    last, (stacked, recorded) = jax.lax.scan(body, init, (rows, taps), **options)
    scanned = [view for views, _ in slices for view in views]
    for record, (operand, active) in zip(seen, recorded, strict=True):
        use = record.use
        kind = "stacked" if any(_stacked_in(use.view, view) for view in scanned) else "shared"
        use.scans = ((kind, p["length"]), *use.scans)
        parent.records.append(Record(use, operand, active))
    out_columns = [
        jaxpr_places(p["jaxpr"].jaxpr, column, count)
        for column, count in zip(columns, parent.counts, strict=True)
    ]
    result = [
        Value(x, tuple(map(leave_carry, place)), level=parent.level)
        for x, place in zip(last, places[consts : consts + carried], strict=True)
    ]
    for i, x in enumerate(stacked):
        place = tuple(outside(column[carried + i]) for column in out_columns)
        result.append(Value(x, place, level=parent.level))
    return result


def cond(parent: Any, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Evaluates a conditional; the records of the branches not taken are zeros."""
    branches = eqn.params["branches"]
    seen: list[list[Record]] = [[] for _ in branches]
    operands = [dataclasses.replace(_outlasting(v), source=None) for v in inputs[1:]]
    places = parent.places_after(eqn, inputs)

    def evaluate(number: int, taps: Any) -> Any:
        child = type(parent)(parent.counts, taps, parent.level + 1)
        out = child.run(branches[number].jaxpr, branches[number].consts, operands)
        out = [_ended(child, "cond", *pair) for pair in zip(out, places, strict=True)]
        seen[number] = child.records
        return [value.x for value in out], [_with_activity(record) for record in child.records]

    shapes = [jax.eval_shape(lambda n=n: evaluate(n, None)[1]) for n in range(len(branches))]
    taps = [parent.take_taps(records) for records in seen]

    def branch(number: int) -> Any:
        def function(taps: Any) -> Any:
            out, recorded = evaluate(number, taps[number])
            filled = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            filled[number] = recorded
            return out, filled

        return function

    out, recorded = jax.lax.switch(inputs[0].x, [branch(n) for n in range(len(branches))], taps)
    for records, values in zip(seen, recorded, strict=True):
        pairs = zip(records, values, strict=True)
        parent.records += [Record(record.use, *value) for record, value in pairs]
    return [Value(x, p, level=parent.level) for x, p in zip(out, places, strict=True)]


def _outlasting(value: Value) -> Value:
    """The value with nothing in its views that a body would compute with and not give back."""
    if not any(isinstance(view.factor, Tracer) for view in value.views):
        return value
    return dataclasses.replace(value, views=tuple(view.absorbed() for view in value.views))


def _with_activity(record: Record) -> tuple[Any, Any]:
    active = record.active
    if active is None:
        active = jnp.ones([length for _, length in record.use.scans])
    return record.operand, active


def _ended(child: Any, primitive: str, value: Value, places: Any) -> Value:
    """A value on its way out of a body; what is a parameter there is one no more outside."""
    return child.materialize(value, primitive, places) if value.views else value


def _slices(parent: Any, value: Value) -> tuple[tuple[View, ...], Any]:
    """The views of the slices that a scan makes of a value, and all of them where known outside."""
    views = value.views
    if not all(view.pure for view in views):
        views = derived(value)
    if views is None:
        parent.lose(value, "scan")
        views = ()
    return tuple(view.unstacked() for view in views), value.point


def _stacked_in(view: View, outer: View) -> bool:
    """Whether ``view`` descends from ``outer``, the slice that a scan made of a parameter."""
    same = view.leaf == outer.leaf and len(view.ops) >= len(outer.ops)
    return same and all(a is b for a, b in zip(view.ops, outer.ops, strict=False))
