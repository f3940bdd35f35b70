"""Inputs and cotangents of every use of every parameter, from one forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.heads import Head
from fvp.numerics import widen
from fvp.tracing.batch_axis_rules import Mixed, Place
from fvp.tracing.embedded import restrict
from fvp.tracing.interpreter import Interpreter
from fvp.tracing.parameter_views import View
from fvp.tracing.uses import Use
from fvp.tracing.values import Record, Value


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model's layers at one batch. Lives inside one trace; not a pytree.

    The batch axes of z along which the model treats its rows independently are *example* axes: a
    cotangent of all examples at once back-propagates each example's own. Along the others rows meet
    (the tokens of an attention layer), and every row needs a cotangent of its own.

    Attributes:
      z: output of the model.
      paths: the names of the parameter leaves.
      shapes: their shapes and dtypes.
      uses: the uses that have a layer rule, in the order of evaluation.
      lost: uses without, whose gradients only plain differentiation gives.
      inputs: for each use, (E, R, G, inputs): examples, rows, groups; indices (E, R, G) of a
        lookup; None for shifts and scales, whose input is one.
      active: for each use in a branch of a conditional (E, R, G), 1 where it was taken, else 0;
        None for the others.
      examples: batch axes of z that are example axes; E is the product of their lengths.
      mixed: where examples met along the first batch axis, or None.
    """

    z: Array
    paths: tuple[str, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any
    uses: tuple[Use, ...]
    lost: tuple[Use, ...]
    inputs: tuple[Any, ...]
    active: tuple[Any, ...]
    examples: tuple[int, ...]
    mixed: Mixed | None
    _counts: tuple[int, ...]
    _pullback: Callable[[Array], Any]
    _factors: tuple[Any, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes of z."""
        return self._counts

    def outputs(self, cotangents: Array) -> list[Array]:
        """Cotangents (K, like z) -> for each use (K, E, R, G, outputs), in float32 or wider.

        Shifts and scales come summed over their rows: their gradient itself, R = 1.
        """
        taps = jax.vmap(self._pullback)(cotangents.astype(self.z.dtype))
        outputs = []
        for use, factor, tap in zip(self.uses, self._factors, taps, strict=True):
            tap = widen(tap)
            if factor is not None:
                tap = tap * widen(factor)
            read = lambda y, use=use: rows_of(
                use, use.read_output, y, self.examples, self._counts, 2
            )
            rows = jax.vmap(read)(tap)
            if use.kind in ("shift", "scale"):
                rows = rows.sum(2, keepdims=True)
                rows = rows * _view_factor(use)
            elif use.view.factor is not None:
                rows = rows * jnp.asarray(use.view.factor).reshape(())
            outputs.append(rows)
        return outputs

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """A tree like the parameters."""
        return jax.tree.unflatten(self.structure, list(leaves))


def capture(
    model_fn: Callable[[Any, Any], Array], head: Head, params: Any, batch: Any, batch_axes: Any = 0
) -> Capture:
    """Traces ``model_fn`` and evaluates it once, with a tap at every use of every parameter."""
    leaves, structure = jax.tree.flatten(params)
    inputs, batch_structure = jax.tree.flatten(batch)

    def flat_model(leaves: Any, inputs: Any) -> Any:
        params = jax.tree.unflatten(structure, leaves)
        return model_fn(params, jax.tree.unflatten(batch_structure, inputs))

    closed, out = jax.make_jaxpr(flat_model, return_shape=True)(leaves, inputs)
    head.check_outputs(out)
    counts = head.batch_shape(out)
    places = _seeds(batch, batch_axes, counts)

    def evaluate(taps: Any) -> tuple[Value, list[Record]]:
        interpreter = Interpreter(counts, taps)
        nowhere = (None,) * len(counts)
        values = [
            Value(leaf, nowhere, (View.of(i, leaf.shape),) if leaf.size else ())
            for i, leaf in enumerate(leaves)
        ]
        values += [Value(x, place) for x, place in zip(inputs, places, strict=True)]
        (z,) = interpreter.run(closed.jaxpr, closed.consts, values)
        if z.views:  # the batch has no part in it: every row is the same function of parameters
            everywhere = tuple(map(Place, range(len(counts))))
            z = interpreter.materialize(z, "the model's output", everywhere)
        for record in interpreter.records:
            restrict(record.use, leaves[record.use.view.leaf].shape)
        return z, interpreter.records

    found: list[Any] = []

    def shapes_only() -> None:
        found[:] = evaluate(None)

    jax.eval_shape(shapes_only)
    uses = [record.use for record in found[1]]
    examples, mixed = _example_axes(found[0], uses, counts)
    zeros = [_tap(use) for use in uses]

    def tapped(taps: Any) -> Any:
        z, records = evaluate(taps)
        found[:] = z, [record.use for record in records]
        return z.x, [(record.operand, record.active) for record in records]

    z, pullback, recorded = jax.vjp(tapped, zeros, has_aux=True)
    uses = found[1]
    ruled = [i for i, use in enumerate(uses) if _has_rule(use, examples)]
    lost = [u for i, u in enumerate(uses) if i not in ruled and u.kind != "nothing"]
    served = [(uses[i], *recorded[i]) for i in ruled]

    def pull(cotangent: Array) -> Any:
        (taps,) = pullback(cotangent)
        return [taps[i] for i in ruled]

    def canonical(use: Use, operand: Any) -> Any:
        if use.kind in ("shift", "scale"):
            return None
        return rows_of(use, use.read_input, operand, examples, counts, 1 + (use.kind != "lookup"))

    def activity(use: Use, active: Any) -> Any:
        if active is None:
            return None
        shape = jax.eval_shape(use.read_output, jax.ShapeDtypeStruct(use.shape, use.dtype)).shape
        everywhere = lambda active: jnp.broadcast_to(active, shape[:-1])
        return rows_of(use, everywhere, active, examples, counts, 1)

    named = jax.tree_util.tree_leaves_with_path(params)
    return Capture(
        z=z,
        paths=tuple("params" + jax.tree_util.keystr(path) for path, _ in named),
        shapes=tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
        structure=structure,
        uses=tuple(use for use, _, _ in served),
        lost=tuple(lost),
        inputs=tuple(canonical(use, operand) for use, operand, _ in served),
        active=tuple(activity(use, active) for use, _, active in served),
        examples=examples,
        mixed=mixed,
        _counts=tuple(counts),
        _pullback=pull,
        _factors=tuple(x if use.kind == "scale" else None for use, x, _ in served),
    )


def _seeds(batch: Any, batch_axes: Any, counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """Where the batch axes of z are in the leaves of the batch; None where a leaf has none.

    A leaf that only happens to have an axis of that length does no harm: what it enters then mixes
    or has its rows, and either is checked on the way to z.
    """
    axes = jax.tree.leaves(
        jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)),
            batch_axes,
            batch,
            is_leaf=lambda axis: axis is None,
        ),
        is_leaf=lambda axis: axis is None,
    )
    places = []
    for leaf, axis in zip(jax.tree.leaves(batch), axes, strict=True):
        shape, row = jnp.shape(leaf), []
        for number, count in enumerate(counts):
            dim = axis if number == 0 else (None if axis not in (0, None) else number)
            if dim is None or not -len(shape) <= dim < len(shape) or shape[dim] != count:
                row.append(None)
            else:
                row.append(Place(dim % len(shape)))
        places.append(tuple(row))
    return places


def _example_axes(z: Value, uses: Sequence[Use], counts: Sequence[int]) -> Any:
    """The batch axes along which rows stay apart, and what mixed the first, if it is not one."""
    kept = []
    for axis in range(len(counts)):
        place = z.places[axis]
        apart = counts[axis] == 1 or place is None or place == Place(axis)
        ruled = [use for use in uses if _is_layer(use)]
        if axis and not all(_row_place(use, axis) for use in ruled):
            apart = False
        if apart and (axis == 0 or kept):
            kept.append(axis)
    if counts[0] == 1 or 0 in kept:
        # One example needs no axis: everything that happens is within it.
        return tuple(axis for axis in kept if counts[axis] > 1), None
    place = z.places[0]
    return (), place if isinstance(place, Mixed) else Mixed("the model's output")


def _row_place(use: Use, axis: int) -> Place | None:
    """Where the examples along a batch axis are among the rows of a use; None if they are not."""
    place = use.places[axis]
    if not isinstance(place, Place):
        return None
    if place.dim < 0:
        return place if use.scans[place.dim][0] == "shared" else None
    return place if place.dim in use.rows else None


def _is_layer(use: Use) -> bool:
    """Whether there is a layer rule for this kind of use."""
    return use.kind not in ("other", "partial", "nothing")


def _has_rule(use: Use, examples: Sequence[int]) -> bool:
    return use.kind not in ("other", "nothing") and all(
        _row_place(use, axis) is not None for axis in examples
    )


def _tap(use: Use) -> Any:
    if use.kind == "other":
        return ()
    return jnp.zeros((*(length for _, length in use.scans), *use.shape), use.dtype)


def _view_factor(use: Use) -> Any:
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


def rows_of(
    use: Use,
    read: Callable[[Array], Array],
    x: Array,
    examples: Sequence[int],
    counts: Sequence[int],
    trailing: int,
) -> Array:
    """``read`` of every scan step, as (E, R, G, ...): ``trailing`` axes, groups first."""
    for _ in use.scans:
        read = jax.vmap(read)
    x = read(x)
    stacked = [i for i, (kind, _) in enumerate(use.scans) if kind == "stacked"]
    shared = [i for i, (kind, _) in enumerate(use.scans) if kind == "shared"]
    first, last = len(use.scans), x.ndim - trailing
    x = x.transpose(*shared, *range(first, last), *stacked, *range(last, x.ndim))
    rows, groups = (
        x.shape[: len(shared) + len(use.rows)],
        x.shape[len(x.shape) - trailing - len(stacked) :],
    )
    shape, where = [], {}
    for number, size in enumerate(rows):
        inside = number >= len(shared)
        dim = use.rows[number - len(shared)] if inside else shared[number] - len(use.scans)
        places = [(_row_place(use, axis), axis) for axis in examples]
        here = [(place.inner, axis) for place, axis in places if place and place.dim == dim]
        for inner, axis in sorted(here, reverse=True):
            shape.append(size // (counts[axis] * inner))
            where[axis] = len(shape)
            shape.append(counts[axis])
            size = inner
        shape.append(size)
    x = x.reshape(*shape, math.prod(groups[: len(stacked) + 1]), *groups[len(stacked) + 1 :])
    front = [where[axis] for axis in examples]
    others = [d for d in range(len(shape)) if d not in front]
    x = x.transpose(*front, *others, *range(len(shape), x.ndim))
    count = math.prod(counts[axis] for axis in examples)
    return x.reshape(count, -1, *x.shape[len(shape) :])
