"""Inputs and cotangents of every use of every parameter, from one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.curvature.problem import spread_axes
from fvp.heads import Head
from fvp.numerics import widen, zeros_of
from fvp.tracing.batch_axes import BatchAxis, Mixed, Part
from fvp.tracing.batch_parts import parts_of
from fvp.tracing.embedded import restrict
from fvp.tracing.example_axes import ExampleAxes
from fvp.tracing.interpreter import Interpreter
from fvp.tracing.jaxprs import Jaxpr
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Record, Value
from fvp.typing import Batch, ModelFn, Params, PyTree, PyTreeDef

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model's uses of its parameters at one batch. Lives inside one trace; not a pytree.

    The batch axes of z along which the model keeps its entries apart are *example* axes: a
    cotangent of all examples at once back-propagates each example's own. Along the others entries
    meet (the tokens of an attention layer), and each of them needs a cotangent of its own. The
    letters E R G I O K are explained in `uses.py`.

    Attributes:
      z: output of the model.
      paths: the names of the parameter leaves.
      shapes: their shapes and dtypes.
      uses: the uses that a layer rule handles, in the order of evaluation.
      unmatched: uses without a rule, whose gradients only plain differentiation gives.
      inputs: for each use (E, R, G, I); indices (E, R, G) of a lookup; None for shifts and scales,
        whose input is one.
      active: for each use in a branch of a conditional, or of a part of the examples, (E, R, G),
        1 where it took place, else 0; None for the others.
    """

    z: Array
    paths: tuple[str, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    structure: PyTreeDef
    uses: tuple[ParameterUse, ...]
    unmatched: tuple[ParameterUse, ...]
    inputs: tuple[Shaped[Array, "E R G ..."] | None, ...]
    active: tuple[Float[Array, "E R G"] | None, ...]
    _axes: ExampleAxes
    _transpose: Callable[[Array], Any]  # a cotangent like z -> those of the uses' outputs
    _factors: tuple[Array | None, ...]  # what each scale multiplies; None for the other uses

    @property
    def examples(self) -> tuple[int, ...]:
        """The batch axes of z that are example axes; E is the product of their lengths."""
        return self._axes.kept

    @property
    def mixed(self) -> Mixed | None:
        """Where examples met along the first batch axis, or None."""
        return self._axes.mixed

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes of z."""
        return self._axes.counts

    def outputs(self, cotangents: Float[Array, "K ..."]) -> list[Float[Array, "K E R G O"]]:
        """Cotangents of z -> those of the output of each use, in float32 or wider.

        Shifts and scales come summed over R: their gradient itself, with R = 1.
        """
        perturbations = jax.vmap(self._transpose)(cotangents.astype(self.z.dtype))
        outputs = []
        for use, factor, delta in zip(self.uses, self._factors, perturbations, strict=True):
            delta = widen(delta)
            if factor is not None:
                delta = delta * widen(factor)
            arrange = lambda y, use=use: self._axes.arrange(use, use.read_output, y, 2)
            delta = jax.vmap(arrange)(delta)
            if use.is_elementwise:
                delta = delta.sum(2, keepdims=True) * _elementwise_factor(use)
            elif use.view.factor is not None:
                delta = delta * jnp.asarray(use.view.factor).reshape(())
            outputs.append(delta)
        return outputs

    def unflatten(self, leaves: Sequence[Any]) -> PyTree:
        """A tree like the parameters."""
        return jax.tree.unflatten(self.structure, list(leaves))


def capture(
    model_fn: ModelFn, head: Head, params: Params, batch: Batch, batch_axes: PyTree = 0
) -> Capture:
    """Traces ``model_fn`` and evaluates it once, with a perturbation at every use of a parameter.

    Twice, in fact: the first time abstractly, for the shapes of the perturbations.
    """
    program = _Program.of(model_fn, head, params, batch, batch_axes)
    uses, axes = program.uses()
    left = _number_unmatched(uses, axes)
    for rows in _rows_of_constants(uses, program.counts) if left else ():
        other = dataclasses.replace(program, rows=rows)
        other_uses, other_axes = other.uses()
        # Where they are none of the examples' rows, examples meet.
        if other_axes == axes and _number_unmatched(other_uses, axes) < left:
            program, uses, left = other, other_uses, _number_unmatched(other_uses, axes)
    output, transpose, records = program.linearized(uses)
    handled = [i for i, record in enumerate(records) if axes.handles(record.use)]
    unmatched = [record.use for i, record in enumerate(records) if i not in handled]
    take = lambda found: [found[i] for i in handled]
    kept = take(records)
    named = jax.tree_util.tree_leaves_with_path(params)
    return Capture(
        z=output,
        paths=tuple("params" + jax.tree_util.keystr(path) for path, _ in named),
        shapes=tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in program.leaves),
        structure=jax.tree.structure(params),
        uses=tuple(record.use for record in kept),
        unmatched=tuple(use for use in unmatched if use.kind != "nothing"),
        inputs=tuple(_inputs(axes, record) for record in kept),
        active=tuple(_activity(axes, record) for record in kept),
        _axes=axes,
        _transpose=lambda cotangent: take(transpose(cotangent)),
        _factors=tuple(r.operand if r.use.kind == "scale" else None for r in kept),
    )


@dataclasses.dataclass(frozen=True)
class _Program:
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
    ) -> _Program:
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


def _inputs(axes: ExampleAxes, record: Record) -> Array | None:
    """The other operand of a use, as (E, R, G, I); indices (E, R, G) of a lookup."""
    use = record.use
    if use.is_elementwise:
        return None
    return axes.arrange(use, use.read_input, record.operand, 1 + (use.kind != "lookup"))


def _activity(axes: ExampleAxes, record: Record) -> Array | None:
    """Whether a use took place, as (E, R, G), where it need not have."""
    use = record.use
    active = record.active
    if active is None and axes.holds_all(use):
        return None
    if active is None:
        active = jnp.ones([length for _, length in use.scans])
    shape = jax.eval_shape(use.read_output, jax.ShapeDtypeStruct(use.shape, use.dtype)).shape
    everywhere = lambda active: jnp.broadcast_to(active, shape[:-1])
    return axes.arrange(use, everywhere, active, 1)


def _elementwise_factor(use: ParameterUse) -> Any:
    """The factor of a shift's or scale's view as (stacks x groups, outputs)."""
    factor = use.view.factor
    if factor is None:
        return 1
    factor = jnp.asarray(factor)
    if factor.ndim == 0:
        return factor
    core = jnp.broadcast_to(factor, use.view.shape)
    whole = use.layout.whole
    groups = core.transpose([d for part in use.parts for d in part]).reshape(-1, whole[2])
    groups = jnp.tile(groups, (whole[0] // groups.shape[0], 1))
    return groups if use.kept is None else groups[np.ix_(use.kept[0], use.kept[2])]
