"""Inputs and cotangents of every use of every parameter, from one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.heads import Head
from fvp.numerics import widen
from fvp.tracing.batch_axes import Mixed
from fvp.tracing.example_axes import ExampleAxes
from fvp.tracing.program import Program
from fvp.tracing.uses import ParameterUse
from fvp.tracing.values import Record
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
    program = Program.of(model_fn, head, params, batch, batch_axes)
    program, uses, axes = program.following_constants()
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
