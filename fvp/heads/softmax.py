"""The categorical distribution over logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.heads.head import Head, log_partition_gap, register_head


@register_head
@dataclasses.dataclass(frozen=True)
class Softmax(Head):
    """Categorical distribution; ``z`` are logits of shape (batch axes, C), ``y`` labels.

    Targets are integers of shape (batch axes) or probability rows of the shape of ``z``, each
    summing to one. With p = softmax(z): F_R u = p (u - p.u), and S w = sqrt(p) w - p (sqrt(p).w).

    Example:
      >>> import jax.numpy as jnp, fvp
      >>> z = jnp.zeros((2, 4))
      >>> print(fvp.Softmax().score(z, jnp.array([0, 3])))
      [[ 0.75 -0.25 -0.25 -0.25]
       [-0.25 -0.25 -0.25  0.75]]
    """

    @property
    def event_ndim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One event axis: the classes."""
        return 1

    def _check_event(self, z: Any, name: str) -> None:
        if z.shape[-1] < 2:
            raise ValueError(
                f"{name}: Softmax expects two classes or more on the last axis, got shape"
                f" {z.shape}; for one logit per example use Sigmoid."
            )

    def _check_targets(self, z: Any, y: Array) -> None:
        if jnp.issubdtype(y.dtype, jnp.floating):
            if y.shape != z.shape:
                raise ValueError(
                    "targets: Softmax expects probability rows of the shape of z, got"
                    f" {y.shape} for z of shape {z.shape}; class labels must be integers."
                )
        elif not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(
                f"targets: Softmax expects integer labels or probability rows, got {y.dtype}."
            )
        elif y.shape != self.batch_shape(z):
            raise ValueError(
                f"targets: Softmax expects integer labels of shape {self.batch_shape(z)} for z of"
                f" shape {z.shape}, got {y.shape}."
            )

    def _nll(self, z: Array, y: Array) -> Array:
        log_p = jax.nn.log_softmax(z)
        if jnp.issubdtype(y.dtype, jnp.integer):
            return -jnp.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]
        # A class of zero probability contributes nothing, even where its logit is -inf.
        return -jnp.sum(jnp.where(y == 0, 0, y * log_p), axis=-1)

    def _mean(self, z: Array) -> Array:
        return jax.nn.softmax(z)

    def _sample(self, key: Array, z: Array, dtype: Any) -> Array:
        del dtype
        return jax.random.categorical(key, z)

    def _score(self, z: Array, y: Array) -> Array:
        if jnp.issubdtype(y.dtype, jnp.integer):
            y = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
        return y - jax.nn.softmax(z)

    def _fisher(self, z: Array, u: Array) -> Array:
        p = jax.nn.softmax(z)
        return p * (u - jnp.sum(p * u, axis=-1, keepdims=True))

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        p = jax.nn.softmax(z)
        root = jnp.sqrt(p)
        return root * w - p * jnp.sum(root * w, axis=-1, keepdims=True)

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        p = jax.nn.softmax(z)
        return jnp.sqrt(p) * (u - jnp.sum(p * u, axis=-1, keepdims=True))

    def _kl(self, z: Array, z_new: Array) -> Array:
        p = jax.nn.softmax(z)
        log_ratio = jax.nn.log_softmax(z) - jax.nn.log_softmax(z_new)
        far = jnp.sum(jnp.where(p == 0, 0, p * log_ratio), axis=-1)
        # Close to each other the form above cancels; each form is evaluated on safe values only.
        excluded = (z == -jnp.inf) & (z_new == -jnp.inf)  # classes masked out of both
        d = jnp.where(excluded, 0, z_new - z)
        d -= jnp.sum(jnp.where(p == 0, 0, p * d), axis=-1, keepdims=True)
        d = jnp.where(excluded, 0, d)
        near = jnp.max(jnp.abs(d), axis=-1) < 1
        close = log_partition_gap(p, jnp.where(near[..., None], d, 0), (-1,))
        return jnp.where(near, close, far)
