"""A Flax Linen train state that forwards what the natural gradient needs.

Linen models are pure functions already: ``model_fn = lambda params, x: module.apply({"params":
params}, x)``. Batch statistics and dropout keys travel in the batch, and so the gradient and the
curvature see the same ones:

  model_fn = lambda params, batch: module.apply(
      {"params": params, "batch_stats": batch["stats"]}, batch["x"],
      rngs={"dropout": batch["key"]}, mutable=["batch_stats"])[0]

Examples:
  >>> import jax, jax.numpy as jnp, fvp, fvp.linen
  >>> from flax import linen as nn
  >>> x, y, module = jnp.eye(3), jnp.array([0, 1, 1]), nn.Dense(2)
  >>> model_fn = lambda params, x: module.apply({"params": params}, x)
  >>> state = fvp.linen.TrainState.create(
  ...     apply_fn=model_fn,
  ...     params=module.init(jax.random.key(0), x)["params"],
  ...     tx=fvp.natural_gradient(1.0, model_fn, fvp.Softmax()),
  ... )
  >>> @jax.jit
  ... def step(state, x, y):
  ...     loss = lambda params: fvp.Softmax().nll(model_fn(params, x), y).mean()
  ...     value, grads = jax.value_and_grad(loss)(state.params)
  ...     return state.apply_gradients(grads=grads, batch=x, targets=y), value
  >>> state, before = step(state, x, y)
  >>> state, after = step(state, x, y)
  >>> bool(after < before)
  True
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax
from flax.training import train_state

from fvp.batch_statistics import mean_statistics


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` takes extra arguments."""

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
        """Updates the parameters and the optimizer state.

        Args:
          grads: like ``params``.
          **kwargs: names of the state's own fields replace those; all others (``batch``,
            ``targets``, ``weights``, ...) are forwarded to ``tx.update``.
        """
        names = {field.name for field in dataclasses.fields(self)}
        changes = {name: value for name, value in kwargs.items() if name in names}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        bound = optax.GradientTransformation(
            self.tx.init, functools.partial(self.tx.update, **extra)
        )
        state = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **changes)
        return state.replace(tx=self.tx)


def estimate_batch_statistics(
    update: Callable[[Any, Any], Any], statistics: Any, batches: Iterable[Any]
) -> Any:
    """The statistics of BatchNorm layers as means over ``batches``, at the parameters as they are.

    Before an evaluation: the running averages lag behind the parameters, the more the longer the
    steps. Costs a forward pass for each batch.

    Args:
      update: ``update(statistics, batch)`` are those after a training pass.
      statistics: the collection "batch_stats".
      batches: what ``update`` reads, one at a time.

    Returns:
      A tree like ``statistics``.

    Raises:
      ValueError: without batches, or where a pass leaves the statistics as they are.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp.linen
      >>> from flax import linen as nn
      >>> x, module = jnp.array([[1.0], [3.0]]), nn.BatchNorm(use_running_average=False)
      >>> variables = module.init(jax.random.key(0), x)
      >>> def update(statistics, x):
      ...     new = {**variables, "batch_stats": statistics}
      ...     return module.apply(new, x, mutable="batch_stats")[1]["batch_stats"]
      >>> found = fvp.linen.estimate_batch_statistics(update, variables["batch_stats"], [x])
      >>> print(found["mean"].round(3), found["var"].round(3))
      [2.] [1.]
    """
    return mean_statistics(update, statistics, batches)
