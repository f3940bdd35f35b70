"""Checks at trace time: what shapes and dtypes can tell, said before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

_ARRAYS = (jax.Array, np.ndarray, np.generic)


def check_inexact_tree(tree: Any, name: str) -> Any:
    """Raises unless every leaf is a real floating-point array; returns the leaves as arrays."""

    def check(path: Any, leaf: Any) -> Array:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int)):
            raise TypeError(f"{where}: expected a floating-point array, got {type(leaf).__name__}.")
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{where}: expected a floating-point array, got dtype {array.dtype}. Keep integer"
                " and boolean leaves out of what is differentiated (pass them in the batch)."
            )
        return array

    return jax.tree_util.tree_map_with_path(check, tree)


def check_arrays(tree: Any, name: str) -> None:
    """Raises where a leaf is neither an array nor a number: a function, say."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "shape") and not isinstance(leaf, (float, int)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)}: expected arrays alone, got"
                f" {type(leaf).__name__}. The parameters of an Equinox module are the first of"
                " eqx.partition(net, eqx.is_inexact_array); model_fn combines them with the second."
            )


def check_like(tree: Any, like: Any, name: str, like_name: str, *, cast: bool = True) -> Any:
    """Raises unless ``tree`` has the structure and shapes of ``like``; ``cast`` to its dtypes."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(
            f"{name}: expected the pytree structure of {like_name}, {expected}, got {structure}."
        )
    tree = check_inexact_tree(tree, name)

    def check(path: Any, leaf: Array, other: Any) -> Array:
        if leaf.shape != other.shape:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected shape {other.shape} as in"
                f" {like_name}, got {leaf.shape}."
            )
        return leaf.astype(other.dtype) if cast else leaf

    return jax.tree_util.tree_map_with_path(check, tree, like)


def broadcast_weights(weights: Any, batch_shape: tuple[int, ...], dtype: Any) -> Array:
    """``weights`` over all batch axes, in ``dtype`` or wider."""
    array = jnp.asarray(weights)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"weights: expected real numbers or a mask, got dtype {array.dtype}.")
    if not _broadcasts(array.shape, batch_shape):
        leading = array.shape + (1,) * (len(batch_shape) - array.ndim)
        hint = ""
        if _broadcasts(leading, batch_shape):
            hint = f"; one weight per example is {_with_axes('weights', leading, array.ndim)}"
        raise ValueError(
            f"weights: expected the batch axes of the model output, {batch_shape}, or a shape that"
            f" broadcasts to them, got {array.shape}{hint}."
        )
    if _is_ambiguous(array.shape, batch_shape):
        rows = _with_axes("weights", batch_shape, array.ndim)
        columns = f"weights[{'None, ' * (len(batch_shape) - array.ndim)}:]"
        raise ValueError(
            f"weights: shape {array.shape} may be one weight per example or one per position of the"
            f" batch axes {batch_shape}; pass {rows} for the former or {columns} for the latter."
        )
    dtype = jnp.promote_types(array.dtype, dtype)
    return jnp.broadcast_to(array.astype(dtype), batch_shape)


def _broadcasts(shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, batch_shape) == batch_shape
    except ValueError:
        return False


def _is_ambiguous(shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> bool:
    """Whether aligning fewer axes with the first batch axes, not the last, fits as well."""
    missing = len(batch_shape) - len(shape)
    leading = shape + (1,) * missing
    return missing > 0 and any(n > 1 for n in shape) and _broadcasts(leading, batch_shape)


def _with_axes(name: str, shape: tuple[int, ...], rank: int) -> str:
    """How axes behind the first ``rank`` are added."""
    return f"{name}[{', '.join([':'] * rank + ['None'] * (len(shape) - rank))}]"


def counted(number: Any, noun: str) -> str:
    """Such as "1 step" and "2 steps", for messages."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_positive_int(value: Any, name: str) -> None:
    """Raises unless ``value`` is a Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"{name}: expected a Python int, got {value!r}; under inject_hyperparams name it in"
            " static_args."
        )
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}.")


def check_nonnegative(value: Any, name: str, hint: str = "") -> None:
    """Raises where a number, or an array of them, is known to be negative or not finite."""
    if isinstance(value, Tracer) or callable(value):
        return
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, *_ARRAYS)):
        raise TypeError(f"{name}: expected a number, got {value!r}{hint}.")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return
    numbers = np.asarray(value)
    if not np.all(np.isfinite(numbers) & (numbers >= 0)):
        raise ValueError(f"{name}: expected a finite number of 0 or more, got {value}{hint}.")
