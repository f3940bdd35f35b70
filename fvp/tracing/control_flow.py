"""Scans and conditionals: perturbations go in, records come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from fvp.compatibility import scan_counts
from fvp.numerics import zeros_of
from fvp.tracing.batch_axes import AxisInfo
from fvp.tracing.derived import derived
from fvp.tracing.jaxprs import Equation
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.propagation import leave_carry, outside, propagate_jaxpr, scan_body_axes
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Record, Value

if TYPE_CHECKING:
    from fvp.tracing.interpreter import Interpreter

Axes = tuple[AxisInfo, ...]  # one for each batch axis


def scan(parent: Interpreter, eqn: Equation, inputs: list[Value]) -> list[Value]:
    """Evaluates a scan: a parameter is shared by its steps, or stacked along the scanned axis."""
    loop = _Loop.of(parent, eqn, inputs)
    seen: list[Record] = []

    def step(carry: Any, scanned: Any) -> Any:
        xs, perturbations = scanned
        child = parent.child(perturbations)
        out = loop.step(child, carry, xs)
        seen[:] = child.records
        recorded = [(record.operand, record.active) for record in child.records]
        return out[: len(carry)], (out[len(carry) :], recorded)

    init, xs = [value.x for value in loop.init], [value.x for value in loop.xs]
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    jax.eval_shape(lambda carry, x: step(carry, (x, None)), init, first)
    perturbations = parent.take_perturbations(seen)
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, (stacked, recorded) = jax.lax.scan(step, init, (xs, perturbations), **options)
    for record, (operand, active) in zip(seen, recorded, strict=True):
        loop.enclose(record.use)
        parent.records.append(Record(record.use, operand, active))
    return loop.outputs(parent, last, stacked)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """A scan and its operands: constants, initial states, and what is scanned over.

    Attributes:
      eqn: the equation.
      axes: for each batch axis what is known of it in the inputs of the body.
      consts: operands that all steps see.
      init: initial states.
      xs: operands of which each step sees a slice.
      slices: the views that such a slice is, and all slices where they are known outside.
    """

    eqn: Equation
    axes: list[list[AxisInfo]]
    consts: list[Value]
    init: list[Value]
    xs: list[Value]
    slices: list[tuple[tuple[ParameterView, ...], Array | None]]

    @classmethod
    def of(cls, parent: Interpreter, eqn: Equation, inputs: list[Value]) -> _Loop:
        """Takes the parameters out of the initial states: what is carried on is no parameter."""
        fixed, carried = scan_counts(eqn)
        axes = [
            scan_body_axes(eqn, [value.batch_axes[i] for value in inputs], count)
            for i, count in enumerate(parent.counts)
        ]
        inputs = [_outlasting(value) for value in inputs]
        consts, rest = inputs[:fixed], inputs[fixed:]
        init, xs = rest[:carried], rest[carried:]
        for i, value in enumerate(init):
            if value.views:
                before = tuple(leave_carry(column[fixed + i]) for column in axes)
                init[i] = parent.materialize(value, "scan", before)
        slices = [_slices(parent, value) for value in xs]
        return cls(eqn, axes, consts, init, xs, slices)

    @property
    def entries(self) -> list[Axes]:
        """For each input of the body where the batch axes are."""
        count = len(self.consts) + len(self.init) + len(self.xs)
        return [tuple(column[i] for column in self.axes) for i in range(count)]

    @property
    def carried(self) -> list[Axes]:
        """The same of what is carried."""
        return self.entries[len(self.consts) : len(self.consts) + len(self.init)]

    def step(self, child: Interpreter, carry: list[Array], xs: list[Array]) -> list[Array]:
        """One step: the new carry and what is stacked."""
        entries = iter(self.entries)
        values = [
            dataclasses.replace(value, batch_axes=next(entries), source=None)
            for value in self.consts
        ]
        values += [Value(x, next(entries), level=child.level) for x in carry]
        values += [
            Value(x, next(entries), views, level=child.level, slices=whole)
            for x, (views, whole) in zip(xs, self.slices, strict=True)
        ]
        body = self.eqn.params["jaxpr"]
        out = child.run(body.jaxpr, body.consts, values)
        after = [*self.carried, *(value.batch_axes for value in out[len(carry) :])]
        return [_ended(child, "scan", *pair).x for pair in zip(out, after, strict=True)]

    def enclose(self, use: ParameterUse) -> None:
        """Notes this scan with a use inside of it."""
        scanned = [view for views, _ in self.slices for view in views]
        kind = "stacked" if any(_descends(use.view, view) for view in scanned) else "shared"
        use.scans = ((kind, self.eqn.params["length"]), *use.scans)

    def outputs(self, parent: Interpreter, last: list[Array], stacked: list[Array]) -> list[Value]:
        """The final states and the stacked outputs, as values."""
        body = self.eqn.params["jaxpr"].jaxpr
        columns = [
            propagate_jaxpr(body, column, count)
            for column, count in zip(self.axes, parent.counts, strict=True)
        ]
        axes = [tuple(map(leave_carry, axes)) for axes in self.carried]
        axes += [
            tuple(outside(column[len(last) + i]) for column in columns) for i in range(len(stacked))
        ]
        pairs = zip((*last, *stacked), axes, strict=True)
        return [Value(x, at, level=parent.level) for x, at in pairs]


def cond(parent: Interpreter, eqn: Equation, inputs: list[Value]) -> list[Value]:
    """Evaluates a conditional; the records of the branches not taken are zeros."""
    branches = eqn.params["branches"]
    seen: list[list[Record]] = [[] for _ in branches]
    operands = [dataclasses.replace(_outlasting(v), source=None) for v in inputs[1:]]
    batch_axes = parent.batch_axes_after(eqn, inputs)

    def evaluate(number: int, perturbations: Any) -> Any:
        child = parent.child(perturbations)
        out = child.run(branches[number].jaxpr, branches[number].consts, operands)
        out = [_ended(child, "cond", *pair) for pair in zip(out, batch_axes, strict=True)]
        seen[number] = child.records
        return [value.x for value in out], [_with_activity(record) for record in child.records]

    shapes = [jax.eval_shape(lambda n=n: evaluate(n, None)[1]) for n in range(len(branches))]
    perturbations = [parent.take_perturbations(records) for records in seen]

    def branch(number: int) -> Callable[[Any], Any]:
        def function(perturbations: Any) -> Any:
            out, recorded = evaluate(number, perturbations[number])
            filled = zeros_of(shapes)
            filled[number] = recorded
            return out, filled

        return function

    functions = [branch(n) for n in range(len(branches))]
    out, recorded = jax.lax.switch(inputs[0].x, functions, perturbations)
    for records, values in zip(seen, recorded, strict=True):
        pairs = zip(records, values, strict=True)
        parent.records += [Record(record.use, *value) for record, value in pairs]
    return [Value(x, axes, level=parent.level) for x, axes in zip(out, batch_axes, strict=True)]


def _outlasting(value: Value) -> Value:
    """The value with nothing in its views that a body would compute with and not give back."""
    if not any(isinstance(view.factor, Tracer) for view in value.views):
        return value
    return dataclasses.replace(value, views=tuple(view.absorbed() for view in value.views))


def _with_activity(record: Record) -> tuple[Any, Array]:
    """What was recorded, with ones for activity outside of conditionals."""
    active = record.active
    if active is None:
        active = jnp.ones([length for _, length in record.use.scans])
    return record.operand, active


def _ended(child: Interpreter, primitive: str, value: Value, batch_axes: Axes) -> Value:
    """A value on its way out of a body; what is a parameter there is one no more outside."""
    return child.materialize(value, primitive, batch_axes) if value.views else value


def _slices(parent: Interpreter, value: Value) -> tuple[tuple[ParameterView, ...], Array | None]:
    """The views of the slices that a scan makes of a value, and all of them where known outside."""
    views = value.views
    if not all(view.pure for view in views):
        views = derived(value)
    if views is None:
        parent.leave_unmatched(value, "scan")
        views = ()
    return tuple(view.unstacked() for view in views), value.point


def _descends(view: ParameterView, outer: ParameterView) -> bool:
    """Whether ``view`` descends from ``outer``, the slice that a scan made of a parameter."""
    same = view.leaf == outer.leaf and len(view.steps) >= len(outer.steps)
    return same and all(a is b for a, b in zip(view.steps, outer.steps, strict=False))
