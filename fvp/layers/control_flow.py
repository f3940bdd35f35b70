"""Scans and conditionals: taps go in, records come out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fvp.layers.places import jaxpr_places, outside, scan_carry
from fvp.layers.uses import Use
from fvp.layers.values import Value
from fvp.layers.views import View


def scan(parent: Any, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Evaluates a scan: a parameter is shared by its steps, or stacked along the scanned axis."""
    p = eqn.params
    consts, carried = p["num_consts"], p["num_carry"]
    columns = [
        scan_carry(eqn, [value.places[i] for value in inputs], count)
        for i, count in enumerate(parent.counts)
    ]
    places = list(zip(*columns, strict=True)) if columns else [()] * len(inputs)
    views: list[View | None] = []
    for i, value in enumerate(inputs):
        view = value.view
        if view is not None and (i >= consts and (i < consts + carried or not view.pure)):
            parent.lose(value, "scan")
            view = None
        elif view is not None and i >= consts + carried:
            view = view.unstacked()
        views.append(view)
    trained = any(value.trained for value in inputs)
    seen: list[tuple[Use, Any]] = []

    def body(carry: Any, slices: Any) -> Any:
        rows, taps = slices
        child = type(parent)(parent.counts, taps, nested=True)
        xs = [*(value.x for value in inputs[:consts]), *carry, *rows]
        values = [
            Value(x, place, view, trained=value.trained or (trained and i >= consts))
            for i, (x, place, view, value) in enumerate(zip(xs, places, views, inputs, strict=True))
        ]
        out = child.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, values)
        for value in out:
            child.lose(value, "scan")
        seen[:] = child.records
        result = [value.x for value in out]
        return result[:carried], (result[carried:], [operand for _, operand in child.records])

    init = [value.x for value in inputs[consts : consts + carried]]
    rows = [value.x for value in inputs[consts + carried :]]
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    jax.eval_shape(lambda c, r: body(c, (r, None)), init, first)
    taps = parent.take_taps(seen)
    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    last, (stacked, operands) = jax.lax.scan(body, init, (rows, taps), **options)
    for (use, _), operand in zip(seen, operands, strict=True):
        kind = "shared"
        scanned = [view for view in views[consts + carried :] if view is not None]
        if any(_stacked_in(use.view, view) for view in scanned):
            kind = "stacked"
        use.scans = ((kind, p["length"]), *use.scans)
        parent.records.append((use, operand))
    out_columns = [
        jaxpr_places(p["jaxpr"].jaxpr, column, count)
        for column, count in zip(columns, parent.counts, strict=True)
    ]
    result = [
        Value(x, place, trained=trained)
        for x, place in zip(last, places[consts : consts + carried], strict=True)
    ]
    for i, x in enumerate(stacked):
        place = tuple(outside(column[carried + i]) for column in out_columns)
        result.append(Value(x, place, trained=trained))
    return result


def cond(parent: Any, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Evaluates a conditional; the records of the branches not taken are zeros."""
    branches = eqn.params["branches"]
    seen: list[list[tuple[Use, Any]]] = [[] for _ in branches]
    operands = inputs[1:]
    trained = any(value.trained for value in inputs)

    def evaluate(number: int, xs: Any, taps: Any) -> Any:
        child = type(parent)(parent.counts, taps, nested=True)
        pairs = zip(operands, xs, strict=True)
        values = [dataclasses.replace(value, x=x, source=None) for value, x in pairs]
        out = child.run(branches[number].jaxpr, branches[number].consts, values)
        for value in out:
            child.lose(value, "cond")
        seen[number] = child.records
        return [value.x for value in out], [operand for _, operand in child.records]

    xs = [value.x for value in operands]
    shapes = [
        jax.eval_shape(lambda xs, n=n: evaluate(n, xs, None)[1], xs) for n in range(len(branches))
    ]
    taps = [parent.take_taps(records) for records in seen]

    def branch(number: int) -> Any:
        def function(xs: Any, taps: Any) -> Any:
            out, operands = evaluate(number, xs, taps[number])
            filled = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            filled[number] = operands
            return out, filled

        return function

    out, recorded = jax.lax.switch(inputs[0].x, [branch(n) for n in range(len(branches))], xs, taps)
    for records, values in zip(seen, recorded, strict=True):
        parent.records += [(use, x) for (use, _), x in zip(records, values, strict=True)]
    places = parent.places_after(eqn, inputs)
    return [Value(x, p, trained=trained) for x, p in zip(out, places, strict=True)]


def _stacked_in(view: View, outer: View) -> bool:
    """Whether ``view`` descends from ``outer``, the slice that a scan made of a parameter."""
    same = view.leaf == outer.leaf and view.ops[: len(outer.ops)] == outer.ops
    return same and bool(outer.ops) and outer.ops[-1][0] == "unstack"
