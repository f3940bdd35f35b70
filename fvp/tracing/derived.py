"""Values that are any function of parameters: a normalised weight, ``W + A @ B``, a mask, a solve.

They do not depend on the batch, so that what back-propagates to them from one example goes on to
the leaves by the derivative of that function, which is the same for all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array

from fvp.compatibility import bind
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.steps import Function
from fvp.tracing.values import Node, Value


def derived(value: Value) -> tuple[ParameterView, ...] | None:
    """The views that ``value`` is, one for each parameter it was computed from.

    None where it depends on something that differs from step to step of a scan and is no slice of
    a parameter.
    """
    steps, bases = _ancestors(value)
    local = [base for base in bases if base.level > 0]
    if any(base.point is None or not base.views for base in local):
        return None
    names = tuple(dict.fromkeys(node.equation.primitive.name for _, node in steps))
    views = []
    for base in bases:
        arguments = local if base in local else [base]
        function = _replayed(value, steps, arguments)
        points = tuple(x for x in (other.point for other in arguments) if x is not None)
        step = Function(function, points, arguments.index(base), names)
        for view in base.views:
            same = all(other.views[0].stacks == view.stacks for other in local)
            if not view.pure or not same:
                return None
            views.append(view.absorbed().then(step, value.x.shape))
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


def _replayed(
    value: Value, steps: Sequence[tuple[Value, Node]], bases: Sequence[Value]
) -> Callable[..., Array]:
    """``value`` as a function of the values that it starts from."""

    def function(*arguments: Array) -> Array:
        env = {id(base): x for base, x in zip(bases, arguments, strict=True)}
        read = lambda v: env.get(id(v), v.x)
        for step, node in steps:
            env[id(step)] = bind(node.equation, [read(v) for v in node.inputs])[node.output]
        return env[id(value)]

    return function
