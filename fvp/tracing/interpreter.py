"""Evaluating a jaxpr while following its parameters to their uses.

Every use's output gets a *tap*, an added zero: the derivative with respect to it is the cotangent
of that output. The other operand of the use is recorded. Calls are evaluated in place, scans and
conditionals with the taps passed into them and the records passed out.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from fvp.compatibility import JIT, bind
from fvp.tracing import control_flow
from fvp.tracing.batch_axis_rules import ELEMENTWISE, AnyPlace, Place
from fvp.tracing.derivative_rules import CUSTOM_RULES, rule_is_of_body
from fvp.tracing.derived import derived
from fvp.tracing.parameter_views import View
from fvp.tracing.propagation import inner_jaxpr, propagate
from fvp.tracing.structure import structural
from fvp.tracing.uses import Use, classify, shift
from fvp.tracing.values import Node, Record, Value

_MOVES = frozenset(
    ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "name")
)
# Where each axis of every operand that is an array is that axis of the output.
_ALIGNED = ELEMENTWISE | {"concatenate", "dynamic_update_slice"}


class Interpreter:
    """Evaluates jaxprs; collects uses with their inputs, and the views that went out of sight.

    Args:
      counts: the number of examples along each batch axis.
      taps: the arrays to add to the outputs of the uses, in the order of :attr:`records`; None to
        add nothing.
      level: how many scans and conditionals this is inside of: values do not outlive them.
    """

    def __init__(
        self, counts: Sequence[int], taps: Sequence[Any] | None = None, level: int = 0
    ) -> None:
        self.counts = tuple(counts)
        self.level = level
        self.records: list[Record] = []
        self._taps = None if taps is None else iter(taps)

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
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

    def _equation(self, eqn: Any, inputs: list[Value]) -> list[Value]:
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
            return self._free(eqn, inputs)
        if name == "scan":
            return control_flow.scan(self, eqn, inputs)
        if name == "cond" and viewed and not inputs[0].views:
            return control_flow.cond(self, eqn, inputs)
        places = self.places_after(eqn, inputs)
        if not viewed:
            return self._moved(eqn, inputs, places)
        uses, inputs = self._uses(eqn, inputs, places[0])
        outputs = self._bind(eqn, inputs, places)
        for use, operand in uses:
            self._record(use, operand, outputs[0])
        if len(uses) == 1 and uses[0][0].kind not in ("shift", "scale"):
            (use, _) = uses[0]
            features = tuple(Place(d) for d in use.features if use.shape[d] > 1)
            outputs[0].source = use, features
        return outputs

    def _moved(self, eqn: Any, inputs: list[Value], places: Any) -> list[Value]:
        outputs = self._bind(eqn, inputs, places)
        if eqn.primitive.name in _MOVES and inputs[0].source is not None:
            outputs[0].source = _moved(eqn, inputs[0].source)
        return outputs

    def _free(self, eqn: Any, inputs: list[Value]) -> list[Value]:
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
                    self.lose(value, eqn.primitive.name)
            output.views = known or ()
        return outputs

    def _structural(self, eqn: Any, inputs: list[Value]) -> list[tuple[View, ...]] | None:
        """For each output its views, where the equation does no more than rearrange."""
        collected: list[tuple[View, ...]] = [()] * len(eqn.outvars)
        for position, value in enumerate(inputs):
            rest = [v for i, v in enumerate(inputs) if i != position]
            others = [self._multiplier(v) for v in rest]
            for view in value.views:
                views = structural(eqn, position, view, others)
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

    def _uses(self, eqn: Any, inputs: list[Value], places: Any) -> tuple[list[Any], list[Value]]:
        """The uses that ``eqn`` makes of its operands with their inputs, and what it then reads."""
        name, inputs = eqn.primitive.name, list(inputs)
        positions = [i for i, value in enumerate(inputs) if value.views]
        uses: list[Any] = []
        for position in positions:
            found = []
            if len(positions) == 1:
                views = inputs[position].views
                found = [classify(eqn, position, view, places) for view in views]
            if not any(map(_differentiable, (var.aval for var in eqn.outvars))):
                continue
            if jnp.issubdtype(inputs[position].x.dtype, jnp.complexfloating):
                self.lose(inputs[position], name)
            elif found and all(use.kind != "other" for use in found):
                operand = inputs[1 - position]
                uses += [(use, _input_of(use, operand)) for use in found]
            elif name in _ALIGNED:
                shape = eqn.outvars[0].aval.shape if name in ELEMENTWISE else None
                inputs[position] = self.materialize(inputs[position], name, places, shape)
            else:
                self.lose(inputs[position], name)
        return uses, inputs

    def materialize(
        self, value: Value, primitive: str, places: tuple[AnyPlace, ...], shape: Any = None
    ) -> Value:
        """The value with a tap of its own at ``places``: its gradient is the tap's cotangent.

        It is repeated to ``shape`` first, as elementwise primitives do.
        """
        x, old = jnp.asarray(value.x), jnp.shape(value.x)
        if shape is not None:
            x = jnp.broadcast_to(x, shape)
        result = Value(x, places, level=self.level)
        for view in value.views:
            self._record(shift(view.spread(old, x.shape), primitive, places, x), (), result)
        return result

    def _record(self, use: Use, operand: Any, output: Value) -> None:
        self.records.append(Record(use, operand))
        if self._taps is not None:
            tap = next(self._taps)
            output.x = output.x if use.kind == "other" else output.x + tap

    def lose(self, value: Value, primitive: str) -> None:
        """Notes that a parameter went where no rule follows."""
        for view in value.views:
            use = Use("other", view, primitive, value.places, ())
            self.records.append(Record(use, ()))
            if self._taps is not None:
                next(self._taps)

    def places_after(self, eqn: Any, inputs: list[Value]) -> list[tuple[AnyPlace, ...]]:
        columns = [
            propagate(eqn, [value.places[i] for value in inputs], count)
            for i, count in enumerate(self.counts)
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(eqn.outvars)

    def _bind(self, eqn: Any, inputs: list[Value], places: Any) -> list[Value]:
        out = bind(eqn, [value.x for value in inputs])
        return [Value(x, p, level=self.level) for x, p in zip(out, places, strict=True)]

    def take_taps(self, records: Sequence[Any]) -> Any:
        if self._taps is None:
            return None
        return [next(self._taps) for _ in records]


_serials = itertools.count()


def _differentiable(x: Any) -> bool:
    """Whether anything depends on ``x`` smoothly: not on a comparison, nor on no numbers at all."""
    return jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 0


def _input_of(use: Use, operand: Value) -> Any:
    """What is recorded of the other operand of a use; a shift keeps the use that it belongs to."""
    if use.kind == "shift":
        if jnp.shape(operand.x) == use.shape:
            use.joined = _shifted(use, operand.source)
        return ()
    x = jnp.asarray(operand.x)
    return use.read_input(x) if use.kind == "scale" else x


def _moved(eqn: Any, source: tuple[Use, tuple[Place, ...]]) -> Any:
    """The source of a rearranged output, where its features stay whole."""
    use, features = source
    sizes = [use.shape[d] for d in use.features if use.shape[d] > 1]
    moved = [propagate(eqn, [f], n)[0] for f, n in zip(features, sizes, strict=True)]
    return (use, tuple(moved)) if all(isinstance(f, Place) for f in moved) else None


def _shifted(use: Use, source: tuple[Use, tuple[Place, ...]] | None) -> Use | None:
    """The use that a shift belongs to: it shifts exactly the features of that use's output."""
    mine = tuple(Place(d) for d in use.features if use.shape[d] > 1)
    return source[0] if source is not None and source[1] == mine else None
