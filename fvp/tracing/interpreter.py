"""Evaluating a jaxpr while following its parameters to their uses.

Every use's output gets a *perturbation*, an added zero: the derivative with respect to it is the
cotangent of that output. The other operand of the use is recorded. Calls are evaluated inline,
scans and conditionals with the perturbations passed into them and the records passed out.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from fvp.compatibility import JIT, bind
from fvp.tracing import control_flow
from fvp.tracing.batch_axes import AxisInfo, BatchAxis
from fvp.tracing.batch_axis_rules import ELEMENTWISE, in_operand
from fvp.tracing.derivative_rules import CUSTOM_RULES, rule_is_of_body
from fvp.tracing.derived import derived
from fvp.tracing.jaxprs import Equation, Jaxpr, free_dimensions, inner_jaxpr
from fvp.tracing.layer_rules import classify, shift
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.propagation import propagate
from fvp.tracing.sources import moved, recorded_operand, source_of
from fvp.tracing.steps import Shape
from fvp.tracing.structure import Operand, structural
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Node, Record, Value

Axes = tuple[AxisInfo, ...]  # one for each batch axis
Views = tuple[ParameterView, ...]

# Where each axis of every operand that is an array is that axis of the output.
_ALIGNED = ELEMENTWISE | {"concatenate", "dynamic_update_slice"}


class Interpreter:
    """Evaluates jaxprs; collects uses with their inputs, and those that no rule follows.

    Args:
      counts: the number of examples along each batch axis.
      perturbations: the arrays to add to the outputs of the uses, in the order of `records`;
        None to add nothing.
      rows: by its length the first batch axis that an axis of a constant is taken for.
      level: how many scans and conditionals this is inside of: values do not outlive them.
    """

    def __init__(
        self,
        counts: Sequence[int],
        perturbations: Sequence[Any] | None = None,
        rows: Mapping[int, BatchAxis] | None = None,
        level: int = 0,
    ) -> None:
        self.counts = tuple(counts)
        self.rows = rows or {}
        self.level = level
        self.records: list[Record] = []
        self._perturbations = None if perturbations is None else iter(perturbations)

    def child(self, perturbations: Sequence[Any] | None) -> Interpreter:
        """An interpreter of the body of a scan or of a branch."""
        return Interpreter(self.counts, perturbations, self.rows, self.level + 1)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Values of the outputs of ``jaxpr``."""
        reads = collections.Counter(
            atom
            for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
            for atom in atoms
            if not isinstance(atom, Literal)
        )
        nowhere = (None,) * len(self.counts)
        env: dict[Any, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Value(const, nowhere)
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return Value(atom.val, nowhere)
            value = env[atom]
            if value.source is not None and reads[atom] > 1:
                value = dataclasses.replace(value, source=None)
            return value

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Equation, inputs: list[Value]) -> list[Value]:
        name, inner = eqn.primitive.name, inner_jaxpr(eqn)
        viewed = any(value.views for value in inputs)
        free = all(value.free for value in inputs)
        own_rule = name in CUSTOM_RULES and viewed
        if own_rule and not free:
            varies = [bool(value.views) or not value.free for value in inputs]
            own_rule = not rule_is_of_body(eqn, inner, [value.x for value in inputs], varies)
        if inner is not None and (viewed or name in JIT) and not own_rule:
            return self.run(inner.jaxpr, inner.consts, inputs)
        if free:
            inputs, free = self._with_rows(eqn, inputs)
        if free:
            return self._free(eqn, inputs)
        if name == "scan":
            return control_flow.scan(self, eqn, inputs)
        if name == "cond" and viewed and not inputs[0].views:
            return control_flow.cond(self, eqn, inputs)
        batch_axes = self.batch_axes_after(eqn, inputs)
        if not viewed:
            outputs = self._bind(eqn, inputs, batch_axes)
            outputs[0].source = moved(eqn, inputs[0].source)
            return outputs
        uses, inputs = self._uses(eqn, inputs, batch_axes[0])
        outputs = self._bind(eqn, inputs, batch_axes)
        for use, operand in uses:
            self._record(use, operand, outputs[0])
        if len(uses) == 1 and not uses[0][0].is_elementwise:
            outputs[0].source = source_of(uses[0][0])
        return outputs

    def _with_rows(self, eqn: Equation, inputs: list[Value]) -> tuple[list[Value], bool]:
        """The inputs, and whether the batch has no part in them.

        It has one in the product of a parameter with a constant that has a row for each example.
        """
        constants = [i for i, value in enumerate(inputs) if not value.views]
        if eqn.primitive.name != "dot_general" or len(constants) != 1:
            return inputs, True
        (position,) = constants
        shape = jnp.shape(inputs[position].x)
        dims = [d for d in free_dimensions(eqn)[position] if shape[d] in self.rows]
        if len(dims) != 1:
            return inputs, True
        axes = (self.rows[shape[dims[0]]].at(dims[0]), *inputs[position].batch_axes[1:])
        inputs = list(inputs)
        inputs[position] = dataclasses.replace(inputs[position], batch_axes=axes)
        return inputs, False

    def _free(self, eqn: Equation, inputs: list[Value]) -> list[Value]:
        """An equation that the batch has no part in: its outputs are views."""
        outputs = self._bind(eqn, inputs, [(None,) * len(self.counts)] * len(eqn.outvars))
        views = self._structural(eqn, inputs)
        serial = next(_serials)
        for i, output in enumerate(outputs):
            output.node = Node(eqn, inputs, i, serial)
            output.level = self.level
            stopped = eqn.primitive.name == "stop_gradient" or not _differentiable(output.x)
            if stopped or not any(value.views for value in inputs):
                continue
            known = derived(output) if views is None else views[i]
            if known is None:
                for value in inputs:
                    self.leave_unmatched(value, eqn.primitive.name)
            output.views = known or ()
        return outputs

    def _structural(
        self, eqn: Equation, inputs: list[Value]
    ) -> list[tuple[ParameterView, ...]] | None:
        """For each output its views, where the equation does no more than rearrange."""
        collected: list[Views] = [()] * len(eqn.outvars)
        for position, value in enumerate(inputs):
            rest = [v for i, v in enumerate(inputs) if i != position]
            others = [self._multiplier(v) for v in rest]
            for view in value.views:
                views = structural(Operand(eqn, position, view), others)
                if views is None or len(views) != len(collected):
                    return None
                collected = [(*old, new) for old, new in zip(collected, views, strict=True)]
        return collected

    def _multiplier(self, value: Value) -> Any:
        """A constant that may multiply a view, as what is no part of a scan's body; or None."""
        if not value.constant:
            return None
        if self.level == 0:
            return value.x
        return None if isinstance(value.x, Tracer) else np.asarray(value.x)

    def _uses(
        self, eqn: Equation, inputs: list[Value], batch_axes: Axes
    ) -> tuple[list[tuple[ParameterUse, Any]], list[Value]]:
        """The uses that ``eqn`` makes of its operands with their inputs, and what it then reads."""
        name, inputs = eqn.primitive.name, list(inputs)
        positions = [i for i, value in enumerate(inputs) if value.views]
        uses: list[tuple[ParameterUse, Any]] = []
        for position in positions:
            found = []
            if len(positions) == 1:
                views = inputs[position].views
                found = [classify(eqn, position, view, batch_axes) for view in views]
            if not any(map(_differentiable, (var.aval for var in eqn.outvars))):
                continue
            if jnp.issubdtype(inputs[position].x.dtype, jnp.complexfloating):
                self.leave_unmatched(inputs[position], name)
            elif found and all(use.kind != "other" for use in found):
                operand = inputs[1 - position]
                uses += [(use, recorded_operand(use, operand)) for use in found]
            elif name in _ALIGNED:
                shape = eqn.outvars[0].aval.shape if name in ELEMENTWISE else None
                pairs = zip(batch_axes, self.counts, strict=True)
                own = tuple(in_operand(eqn, position, *pair) for pair in pairs)
                inputs[position] = self.materialize(inputs[position], name, own, shape)
            else:
                self.leave_unmatched(inputs[position], name)
        return uses, inputs

    def materialize(
        self, value: Value, primitive: str, batch_axes: Axes, shape: Shape | None = None
    ) -> Value:
        """The value as data with these batch axes, with a perturbation to read its gradient from.

        It is repeated to ``shape`` first, as elementwise primitives do.
        """
        x, old = jnp.asarray(value.x), jnp.shape(value.x)
        if shape is not None:
            x = jnp.broadcast_to(x, shape)
        result = Value(x, batch_axes, level=self.level)
        for view in value.views:
            self._record(shift(view.spread(old, x.shape), primitive, batch_axes, x), (), result)
        return result

    def _record(self, use: ParameterUse, operand: Any, output: Value) -> None:
        self.records.append(Record(use, operand))
        if self._perturbations is not None:
            perturbation = next(self._perturbations)
            output.x = output.x if use.kind == "other" else output.x + perturbation

    def leave_unmatched(self, value: Value, primitive: str) -> None:
        """Records a use of a parameter that no rule follows."""
        for view in value.views:
            use = ParameterUse("other", view, primitive, value.batch_axes, ())
            self.records.append(Record(use, ()))
            if self._perturbations is not None:
                next(self._perturbations)

    def batch_axes_after(self, eqn: Equation, inputs: list[Value]) -> list[Axes]:
        """Where the batch axes are in the outputs of ``eqn``."""
        columns = [
            propagate(eqn, [value.batch_axes[i] for value in inputs], count)
            for i, count in enumerate(self.counts)
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(eqn.outvars)

    def _bind(self, eqn: Equation, inputs: list[Value], batch_axes: Sequence[Axes]) -> list[Value]:
        out = bind(eqn, [value.x for value in inputs])
        return [Value(x, axes, level=self.level) for x, axes in zip(out, batch_axes, strict=True)]

    def take_perturbations(self, records: Sequence[Record]) -> list[Any] | None:
        """Those of ``records``, which a body is about to record."""
        if self._perturbations is None:
            return None
        return [next(self._perturbations) for _ in records]


_serials = itertools.count()


def _differentiable(x: Any) -> bool:
    """Whether anything depends on ``x`` smoothly: not on a comparison, nor on no numbers at all."""
    return jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 0
