"""A Flax Linen train state that forwards what the natural gradient needs.

Linen models are pure functions already: ``model_fn = lambda params, x: module.apply({"params":
params}, x)``. Batch statistics and dropout keys travel in the batch, and so the gradient and the
curvature see the same ones:

  model_fn = lambda params, batch: module.apply(
      {"params": params, "batch_stats": batch["stats"]}, batch["x"],
      rngs={"dropout": batch["key"]}, mutable=["batch_stats"])[0]

Example:
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
  ...     return state.apply_gradients(grads=grads, batch=x), value
  >>> state, before = step(state, x, y)
  >>> state, after = step(state, x, y)
  >>> bool(after < before)
  True
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax
from flax.training import train_state


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
