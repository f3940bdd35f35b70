"""Values that are any function of parameters: a normalised weight, ``W + A @ B``, a mask, a solve.

They do not depend on the batch, so that what back-propagates to them from one example goes on to
the leaves by the derivative of that function, which is the same for all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fvp.compatibility import bind
from fvp.tracing.parameter_views import Function, ParameterView
from fvp.tracing.values import Node, Value


def derived(value: Value) -> tuple[ParameterView, ...] | None:
    """The views that ``value`` is, one for each parameter it was computed from.

    None where it depends on something that differs from step to step of a scan and is no slice of
    a parameter.
    """
    steps, bases = _ancestors(value)
    local = [base for base in bases if base.level > 0]
    if any(base.point is None for base in local) or any(not base.views for base in local):
        return None
    views = []
    for base in bases:
        for view in base.views:
            same = all(other.views[0].stacks == view.stacks for other in local)
            if not view.pure or not same:
                return None
            points = local if base in local else [base]
            function = _replayed(value, steps, points)
            names = tuple(dict.fromkeys(node.equation.primitive.name for _, node in steps))
            arguments = tuple(other.point for other in points)
            op = Function(function, arguments, points.index(base), names)
            views.append(view.absorbed().then(("function", op), value.x.shape))
    return tuple(views)


def _ancestors(value: Value) -> tuple[list[tuple[Value, Node]], list[Value]]:
    """The values on the way to ``value``, in order, and those that they start from."""
    found: dict[int, Value] = {}
    waiting = [value]
    while waiting:
        v = waiting.pop()
        if id(v) in found or (v is not value and v.level == 0 and not v.views):
            continue
        found[id(v)] = v
        if v.node is not None:
            waiting += v.node.inputs
    steps = [(v, v.node) for v in found.values() if v.node is not None]
    steps.sort(key=lambda step: step[1].serial)
    return steps, [v for v in found.values() if v.node is None]


def _replayed(value: Value, steps: Sequence[tuple[Value, Node]], bases: Sequence[Value]) -> Any:
    """``value`` as a function of the values that it starts from."""

    def function(*arguments: Any) -> Any:
        env = {id(base): x for base, x in zip(bases, arguments, strict=True)}
        read = lambda v: env.get(id(v), v.x)
        for step, node in steps:
            env[id(step)] = bind(node.equation, [read(v) for v in node.inputs])[node.output]
        return env[id(value)]

    return function
