"""Flax NNX models as pure functions, with a snapshot of all that is not a parameter.

NNX modules carry state that a training pass changes: BatchNorm statistics, dropout counters. The
curvature pass must see that state as the gradient pass saw it, or the two belong to different
functions (another dropout mask, say). Take the snapshot before the gradient pass.

Examples:
  >>> import jax, jax.numpy as jnp, fvp, fvp.nnx
  >>> from flax import nnx
  >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  >>> tx = fvp.natural_gradient(1.0, fvp.nnx.model_fn, fvp.Softmax())
  >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  >>> @nnx.jit
  ... def step(model, optimizer, x, y):
  ...     batch = fvp.nnx.snapshot(model, x)
  ...     loss = lambda model: fvp.Softmax().nll(model(x), y).mean()
  ...     value, grads = nnx.value_and_grad(loss)(model)
  ...     optimizer.update(model, grads, batch=batch, targets=y)
  ...     return value
  >>> x, y = jnp.eye(3), jnp.array([0, 1, 1])
  >>> bool(step(model, optimizer, x, y) > step(model, optimizer, x, y))
  True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fvp.batch_statistics import mean_statistics
from fvp.compatibility import pure_state


class Snapshot(NamedTuple):
    """What `model_fn` reads as its batch; made by `snapshot`."""

    graphdef: Any  # the static structure of the module; a pytree without leaves
    rest: Any  # all variables that are not differentiated, as plain arrays
    inputs: Any  # (args, kwargs) of the call


#: For ``chunk_size``: the inputs carry the example axis first, the rest is shared by all chunks.
BATCH_AXES = Snapshot(graphdef=None, rest=None, inputs=0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Constant:
    """An argument that is part of the program (``train=True``), not data."""

    value: Any


def parameters(model: nnx.Module, wrt: Any = nnx.Param) -> Any:
    """The parameters of ``model`` as a pytree of plain arrays; the ``params`` of `model_fn`.

    Args:
      model: NNX module.
      wrt: filter that selects the variables to differentiate, as in ``nnx.Optimizer``.
    """
    return pure_state(nnx.state(model, wrt))


def snapshot(model: nnx.Module, *args: Any, wrt: Any = nnx.Param, **kwargs: Any) -> Snapshot:
    """The batch for `model_fn`: the call ``model(*args, **kwargs)``, its state as it is now.

    Args:
      model: NNX module, in the mode (``train()`` or ``eval()``) that the gradient pass uses.
      *args: what the module is called with; arguments that are not arrays are static.
      wrt: filter that selects the variables to differentiate, as in ``nnx.Optimizer``.
      **kwargs: likewise.
    """
    graphdef, _, rest = nnx.split(model, wrt, ...)
    inputs = jax.tree.map(lambda x: x if _is_array(x) else _Constant(x), (args, kwargs))
    # Pure: what ``split`` returns stays live, and the gradient pass would advance it.
    return Snapshot(graphdef, pure_state(rest), inputs)


def model_fn(params: Any, batch: Snapshot) -> Any:
    """The module as a pure function; pass it to ``fvp.fisher`` or ``fvp.natural_gradient``.

    Changes that the call makes to the module's state are discarded: the gradient pass makes them.

    Raises:
      TypeError: where ``batch`` is none of `snapshot`.
    """
    if not isinstance(batch, Snapshot):
        raise TypeError(
            f"batch: expected fvp.nnx.snapshot(net, x), got {type(batch).__name__}; take it before"
            " the gradient pass."
        )
    is_constant = lambda x: isinstance(x, _Constant)
    args, kwargs = jax.tree.map(
        lambda x: x.value if is_constant(x) else x, batch.inputs, is_leaf=is_constant
    )
    return nnx.merge(batch.graphdef, params, batch.rest)(*args, **kwargs)


def estimate_batch_statistics(model: nnx.Module, batches: Iterable[Any]) -> None:
    """Sets the statistics of the BatchNorm layers of ``model`` to their means over ``batches``.

    Before an evaluation: the running averages lag behind the parameters, the more the longer the
    steps. Costs a forward pass in training mode for each batch; dropout stays as it is.

    Args:
      model: NNX module, changed in place.
      batches: what the module is called with, one at a time; a tuple is several arguments.

    Raises:
      ValueError: without batches.

    Examples:
      >>> import jax.numpy as jnp, fvp.nnx
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [3.0]], jnp.float32)
      >>> fvp.nnx.estimate_batch_statistics(model, [x])
      >>> print(model.mean[...].round(3), model.var[...].round(3))
      [2.] [1.]
    """
    graphdef, averages, rest = nnx.split(model, nnx.BatchStat, ...)
    averages, rest = pure_state(averages), pure_state(rest)

    def update(averages: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, averages, rest)
        copy.set_attributes(use_running_average=False, raise_if_not_found=False)
        copy(*(batch if isinstance(batch, tuple) else (batch,)))
        return pure_state(nnx.state(copy, nnx.BatchStat))

    nnx.update(model, mean_statistics(update, averages, batches))


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))
