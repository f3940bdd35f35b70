"""Evaluating a jaxpr while following its parameters to their uses.

Every use's output gets a *tap*, an added zero: the derivative with respect to it is the cotangent
of that output. The other operand of the use is recorded. Calls are evaluated in place, scans and
conditionals with the taps passed into them and the records passed out.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Literal

from fvp.jaxprs import bind
from fvp.layers import control_flow
from fvp.layers.derivative_rules import CUSTOM_RULES, rule_is_of_body
from fvp.layers.place_rules import AnyPlace, Place
from fvp.layers.places import inner_jaxpr, propagate
from fvp.layers.uses import Use, classify
from fvp.layers.values import Value
from fvp.layers.views import View, structural

_MOVES = frozenset(
    ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "name")
)


class Interpreter:
    """Evaluates jaxprs; collects uses with their inputs, and the views that went out of sight.

    Args:
      counts: the number of examples along each batch axis.
      taps: the arrays to add to the outputs of the uses, in the order of :attr:`records`; None to
        add nothing.
      nested: inside the body of a scan or conditional, whose values do not outlive it.
    """

    def __init__(
        self, counts: Sequence[int], taps: Sequence[Any] | None = None, nested: bool = False
    ) -> None:
        self.counts = tuple(counts)
        self._nested = nested
        self.records: list[tuple[Use, Any]] = []
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
        name = eqn.primitive.name
        viewed = any(value.view is not None for value in inputs)
        inner = inner_jaxpr(eqn)
        if (
            inner is not None
            and (viewed or name in ("jit", "pjit"))
            and (name not in CUSTOM_RULES or rule_is_of_body(eqn, inner))
        ):
            return self.run(inner.jaxpr, inner.consts, inputs)
        if name == "scan":
            return control_flow.scan(self, eqn, inputs)
        if name == "cond" and viewed and inputs[0].view is None:
            return control_flow.cond(self, eqn, inputs)
        places = self.places_after(eqn, inputs)
        trained = any(value.trained for value in inputs)
        if viewed and (views := self._structural(eqn, inputs)) is not None:
            values = self._bind(eqn, inputs, places, trained)
            for value, view in zip(values, views, strict=True):
                value.view = view
            return values
        used = self._use(eqn, inputs, places[0]) if viewed else None
        values = self._bind(eqn, inputs, places, trained)
        if used is not None:
            self._record(used[0], used[1], values[0])
        elif name in _MOVES and inputs[0].source is not None:
            values[0].source = _moved(eqn, inputs[0].source)
        return values

    def _structural(self, eqn: Any, inputs: list[Value]) -> list[View] | None:
        positions = [i for i, value in enumerate(inputs) if value.view is not None]
        view = inputs[positions[0]].view
        if len(positions) > 1 or view is None:
            return None
        usable = lambda v: v.constant and not (self._nested and isinstance(v.x, Tracer))
        others = [v.x if usable(v) else None for v in inputs if v.view is None]
        return structural(eqn, positions[0], view, others)

    def _use(self, eqn: Any, inputs: list[Value], places: Any) -> tuple[Use, Any] | None:
        """The one use that ``eqn`` is, and its input; several views at once are out of sight."""
        positions = [i for i, value in enumerate(inputs) if value.view is not None]
        if len(positions) == 1:
            (position,) = positions
            view = inputs[position].view
            assert view is not None
            use = classify(eqn, position, view, places)
            if use.kind != "other":
                operand = inputs[1 - position]
                if use.kind == "shift":
                    if jnp.shape(operand.x) == use.shape:
                        use.joined = _shifted(use, operand.source)
                    return use, ()
                x = jnp.asarray(operand.x)
                return use, use.read_input(x) if use.kind == "scale" else x
        for position in positions:
            self.lose(inputs[position], eqn.primitive.name)
        return None

    def _record(self, use: Use, operand: Any, output: Value) -> None:
        self.records.append((use, operand))
        if self._taps is not None:
            output.x = output.x + next(self._taps)
        features = tuple(Place(d) for d in use.features if use.shape[d] > 1)
        output.source = None if use.kind in ("shift", "scale") else (use, features)

    def lose(self, value: Value, primitive: str) -> None:
        """Notes that a parameter went where no rule follows."""
        if value.view is not None:
            use = Use("other", value.view, primitive, value.places, ())
            self.records.append((use, ()))
            if self._taps is not None:
                next(self._taps)

    def places_after(self, eqn: Any, inputs: list[Value]) -> list[tuple[AnyPlace, ...]]:
        columns = [
            propagate(eqn, [value.places[i] for value in inputs], count)
            for i, count in enumerate(self.counts)
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(eqn.outvars)

    def _bind(self, eqn: Any, inputs: list[Value], places: Any, trained: bool) -> list[Value]:
        out = bind(eqn, [value.x for value in inputs])
        return [Value(x, p, trained=trained) for x, p in zip(out, places, strict=True)]

    def take_taps(self, records: Sequence[Any]) -> Any:
        if self._taps is None:
            return None
        return [next(self._taps) for _ in records]


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
