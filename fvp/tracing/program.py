"""A model as a program: evaluated with what it does to its parameters on record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature.problem import spread_axes
from fvp.heads import Head
from fvp.numerics import zeros_of
from fvp.tracing.batch_axes import BatchAxis, Part
from fvp.tracing.batch_parts import parts_of
from fvp.tracing.embedded import restrict
from fvp.tracing.example_axes import ExampleAxes
from fvp.tracing.interpreter import Interpreter
from fvp.tracing.jaxprs import Jaxpr
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Record, Value
from fvp.typing import Batch, ModelFn, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced model and its arguments.

    Attributes:
      jaxpr: of the model, closed, as a function of ``leaves`` and ``inputs``.
      leaves: those of the parameters.
      inputs: the leaves of the batch.
      entries: for each of them where the batch axes of z are.
      counts: the lengths of the batch axes of z.
      rows: of constants, see `Interpreter`.
    """

    jaxpr: Jaxpr
    leaves: list[Array]
    inputs: list[Any]
    entries: list[tuple[BatchAxis | None, ...]]
    counts: tuple[int, ...]
    rows: Mapping[int, BatchAxis] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model_fn: ModelFn, head: Head, params: Params, batch: Batch, batch_axes: PyTree
    ) -> Program:
        """Traces ``model_fn``."""
        leaves, structure = jax.tree.flatten(params)
        inputs, batch_structure = jax.tree.flatten(batch)

        def flat_model(leaves: list[Any], inputs: list[Any]) -> Any:
            params = jax.tree.unflatten(structure, leaves)
            return model_fn(params, jax.tree.unflatten(batch_structure, inputs))

        jaxpr, out = jax.make_jaxpr(flat_model, return_shape=True)(leaves, inputs)
        head.check_outputs(out)
        counts = tuple(head.batch_shape(out))
        entries = _entries(jaxpr.jaxpr, inputs, spread_axes(batch, batch_axes), counts)
        return cls(jaxpr, leaves, inputs, entries, counts)

    def evaluate(self, perturbations: Sequence[Array] | None) -> tuple[Value, list[Record]]:
        """The output z, with these added to the outputs of the uses, and the uses' records."""
        interpreter = Interpreter(self.counts, perturbations, self.rows)
        nowhere = (None,) * len(self.counts)
        values = [
            Value(leaf, nowhere, (ParameterView.of(i, leaf.shape),) if leaf.size else ())
            for i, leaf in enumerate(self.leaves)
        ]
        values += [Value(x, axes) for x, axes in zip(self.inputs, self.entries, strict=True)]
        (z,) = interpreter.run(self.jaxpr.jaxpr, self.jaxpr.consts, values)
        if z.views:  # a function of parameters alone: the same for every example
            everywhere = tuple(map(BatchAxis, range(len(self.counts))))
            z = interpreter.materialize(z, "the model's output", everywhere)
        for record in interpreter.records:
            restrict(record.use, self.leaves[record.use.view.leaf].shape)
        return z, interpreter.records

    def uses(self) -> tuple[list[ParameterUse], ExampleAxes]:
        """The uses, and the axes along which examples stay apart, by shapes alone."""
        found: list[Any] = []

        def abstractly() -> None:
            found[:] = self.evaluate(None)

        jax.eval_shape(abstractly)
        z, records = found
        uses = [record.use for record in records]
        return uses, ExampleAxes.of(z, uses, self.counts)

    def following_constants(self) -> tuple[Program, list[ParameterUse], ExampleAxes]:
        """With the ``rows`` that leave fewest uses without a layer rule; its uses and axes.

        That a constant has a row for each example nothing tells but its length. So rows are tried
        where uses are left without a rule, and taken where examples stay apart all the same.
        """
        program, (uses, axes) = self, self.uses()
        left = _number_unmatched(uses, axes)
        for rows in _rows_of_constants(uses, self.counts) if left else ():
            other = dataclasses.replace(self, rows=rows)
            other_uses, other_axes = other.uses()
            if other_axes == axes and _number_unmatched(other_uses, axes) < left:
                program, uses, left = other, other_uses, _number_unmatched(other_uses, axes)
        return program, uses, axes

    def linearized(
        self, uses: Sequence[ParameterUse]
    ) -> tuple[Array, Callable[[Array], list[Any]], list[Record]]:
        """The output; its transposed derivative in the perturbations of ``uses``; the records."""
        found: list[ParameterUse] = []

        def perturbed(perturbations: Any) -> Any:
            z, records = self.evaluate(perturbations)
            found[:] = [record.use for record in records]
            return z.x, [(record.operand, record.active) for record in records]

        zeros = [_zero_perturbation(use) for use in uses]
        output, vjp, recorded = jax.vjp(perturbed, zeros, has_aux=True)
        records = [Record(use, *pair) for use, pair in zip(found, recorded, strict=True)]
        return output, lambda cotangent: vjp(cotangent)[0], records


def _entries(
    jaxpr: Jaxpr, inputs: Sequence[Any], batch_axes: Sequence[int | None], counts: Sequence[int]
) -> list[tuple[BatchAxis | None, ...]]:
    """Where the batch axes of z are in the leaves of the batch; None where a leaf has none.

    A leaf that only happens to have an axis of that length does no harm: whether examples stay
    apart is checked on the way to z.
    """
    shapes = [jnp.shape(leaf) for leaf in inputs]
    length = lambda dim, shape: (
        None if dim is None or not -len(shape) <= dim < len(shape) else shape[dim]
    )
    lengths = list(map(length, batch_axes, shapes))
    others = [None] * (len(jaxpr.invars) - len(inputs))  # the parameters
    parts = parts_of(jaxpr, [*others, *lengths], counts[0])[len(others) :]

    def entry(number: int, shape: Sequence[int], axis: int | None, part: Part | None) -> Any:
        # Further batch axes follow the first where that leads.
        dim = axis if number == 0 else (None if axis not in (0, None) else number)
        if dim is not None and length(dim, shape) == counts[number]:
            return BatchAxis(dim % len(shape))
        if dim is None or number or part is None:
            return None
        return BatchAxis(dim % len(shape), 1, part)

    numbers = range(len(counts))
    return [
        tuple(entry(number, *leaf) for number in numbers)
        for leaf in zip(shapes, batch_axes, parts, strict=True)
    ]


def _number_unmatched(uses: Sequence[ParameterUse], axes: ExampleAxes) -> int:
    return sum(use.kind != "nothing" and not axes.handles(use) for use in uses)


def _rows_of_constants(
    uses: Sequence[ParameterUse], counts: Sequence[int]
) -> Iterator[dict[int, BatchAxis]]:
    """For the lengths of the parts of the first batch axis in the uses the axis of such a part.

    In turn for each of the parts that are equally long.
    """
    parts: dict[int, set[Part]] = {}
    for axis in (use.batch_axes[0] for use in uses):
        if isinstance(axis, BatchAxis) and axis.stretch(counts[0]).length > 1:
            part = axis.stretch(counts[0])
            parts.setdefault(part.length, set()).add(part)
    for turn in range(max(map(len, parts.values()), default=0)):
        chosen = {length: sorted(same)[turn % len(same)] for length, same in parts.items()}
        axes = {length: BatchAxis(0).of(part, counts[0]) for length, part in chosen.items()}
        yield {length: axis for length, axis in axes.items() if axis is not None}


def _zero_perturbation(use: ParameterUse) -> Any:
    """The zero that is added to the output of a use, in all steps of the scans around it."""
    if use.kind == "other":
        return ()
    shape = (*(length for _, length in use.scans), *use.shape)
    return zeros_of(jax.ShapeDtypeStruct(shape, use.dtype))
