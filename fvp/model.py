"""A model function and its batch, parted into arrays and program.

A model may be a plain function, a ``jax.tree_util.Partial`` or a module that is a pytree; its batch
may hold flags and strings beside arrays. Arrays are data: they are traced, stored and split.
Everything else is part of the program and never reaches a transformation of JAX as a leaf.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_ARRAY = object()  # stands where a leaf is an array


@dataclasses.dataclass(frozen=True, eq=False)
class _Unhashable:
    """A leaf that does not hash, such as an array of strings: equal to itself alone."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashable) and other.value is self.value


def is_array(leaf: Any) -> bool:
    """Whether a leaf is data: an array, or a floating-point number."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSU"
    return isinstance(leaf, (jax.Array, float))


def part(tree: Any) -> tuple[list[Any], Any, tuple[Any, ...]]:
    """The arrays of a tree, its structure, and its other leaves with holes for the arrays."""
    leaves, structure = jax.tree.flatten(tree)
    fixed = tuple(_ARRAY if is_array(leaf) else hashable(leaf) for leaf in leaves)
    return [leaf for leaf in leaves if is_array(leaf)], structure, fixed


def hashable(leaf: Any) -> Any:
    """The leaf, or where it does not hash an object that stands for it."""
    try:
        hash(leaf)
    except TypeError:
        return _Unhashable(leaf)
    return leaf


def unhashed(leaf: Any) -> Any:
    """The leaf that `hashable` was given."""
    return leaf.value if isinstance(leaf, _Unhashable) else leaf


def join(arrays: Sequence[Any], structure: Any, fixed: Sequence[Any]) -> Any:
    """The tree that `part` took apart."""
    rest = iter(arrays)
    leaves = [next(rest) if x is _ARRAY else unhashed(x) for x in fixed]
    return jax.tree.unflatten(structure, leaves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """``model(params, batch) -> z`` on batches of arrays; a pytree whose leaves are arrays."""

    arrays: list[Any]
    structure: Any = dataclasses.field(metadata={"static": True})
    fixed: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    batch: Any = dataclasses.field(metadata={"static": True})  # structure and fixed; None: as it is
    layout: Any = dataclasses.field(default=None, metadata={"static": True})  # of several outputs

    @classmethod
    def of(cls, model_fn: Any) -> Model:
        """From a callable."""
        if isinstance(model_fn, Model):
            return model_fn
        call = (model_fn, (), {})
        if isinstance(model_fn, jax.tree_util.Partial):
            call = (model_fn.func, model_fn.args, model_fn.keywords)
        return cls(*part(call), None)

    def __call__(self, params: Any, batch: Any) -> Any:
        function, args, keywords = join(self.arrays, self.structure, self.fixed)
        if self.batch is not None:
            batch = join(jax.tree.leaves(batch), *self.batch)
        try:
            z = function(*args, params, batch, **keywords)
        except Exception as error:
            _explain(error, params, batch)
            raise
        return z if self.layout is None else self.layout.join(z)


def _explain(error: Exception, params: Any, batch: Any) -> None:
    """Adds to an error of the model's own what it was called with, where nothing says so yet."""
    opening = "fvp called model_fn(params, batch) -> z"
    if any(note.startswith(opening) for note in getattr(error, "__notes__", ())):
        return
    error.add_note(
        f"{opening} with params {_shapes(params)} and batch {_shapes(batch)}. Labels go into"
        " targets=, not the batch. A module is wrapped: lambda params, x: module.apply({'params':"
        " params}, x), fvp.nnx.model_fn, or lambda params, x: jax.vmap(eqx.combine(params,"
        " rest))(x)."
    )


def _shapes(tree: Any) -> str:
    """Where a tree has which arrays, in one line that is not long; puts nothing into the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    kind = lambda x: f"{x.dtype}{list(x.shape)}" if is_array(x) and hasattr(x, "shape") else repr(x)
    shown = "; ".join(f"{jax.tree_util.keystr(path)} {kind(x)}".strip() for path, x in leaves)
    return f"({textwrap.shorten(shown, 300, placeholder=' ...')})"


def close_model(model_fn: Any, batch: Any) -> tuple[Model, Any]:
    """The model of the arrays of ``batch``, and the batch with None for its other leaves.

    Raises:
      TypeError: if ``model_fn`` is not callable.
    """
    if not callable(model_fn):
        raise TypeError(f"model_fn: expected model_fn(params, batch) -> z, got {model_fn!r}.")
    model = Model.of(model_fn)
    arrays, structure, fixed = part(batch)
    if len(arrays) == len(fixed):
        return model, batch
    if model.batch is not None:
        raise ValueError("batch: expected the arrays that this model was closed over, got others.")
    holes = [x if x is _ARRAY else None for x in fixed]
    model = dataclasses.replace(model, batch=(structure, fixed))
    return model, join(arrays, structure, holes)
