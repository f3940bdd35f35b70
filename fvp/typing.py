"""Names for what has no narrower type: pytrees of the user's own making, and functions of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax import Array

#: A pytree of any kind.
PyTree: TypeAlias = Any

#: A ``jax.tree_util.PyTreeDef``, which type checkers see as a variable.
PyTreeDef: TypeAlias = Any

#: A pytree of floating-point arrays.
Params: TypeAlias = Any

#: A pytree that the model reads; each leaf that is an array may have an example axis.
Batch: TypeAlias = Any

#: ``model_fn(params, batch) -> z``.
ModelFn: TypeAlias = Callable[[Params, Batch], Array]

#: An array, or what ``jax.eval_shape`` says of one.
ArrayOrShape: TypeAlias = Array | jax.ShapeDtypeStruct
