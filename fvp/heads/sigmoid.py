"""Independent Bernoulli distributions over logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.head import NaturalHead, check_event_ndim, log_partition_gap
from fvp.heads.root import Root, flat_events, unit_columns
from fvp.numerics import divide_above_rounding


@dataclasses.dataclass(frozen=True)
class Sigmoid(NaturalHead):
    """Independent Bernoulli outputs; ``z`` are logits, ``y`` in [0, 1] of the shape of ``z``.

    With p = sigmoid(z): F_R u = p (1 - p) u, and S = diag sqrt(p (1 - p)). A logit may be infinite:
    the outcome is then certain, nll 0 or inf. Targets outside [0, 1] count as they do in
    nll = softplus(z) - y z, with score y - p.

    Args:
      event_ndim: how many trailing axes of ``z`` make one example (its outputs). With 0 every
        entry of ``z`` is an example.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> print(fvp.Sigmoid().fisher(jnp.zeros((2, 3)), jnp.ones((2, 3))))
      [[0.25 0.25 0.25]
       [0.25 0.25 0.25]]
    """

    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)

    def _nll(self, z: Array, y: Array) -> Array:
        # softplus(z) - y z, in the form that keeps the digits of a confident, correct logit.
        y = y.astype(z.dtype)
        terms = _times(y, jax.nn.softplus(-z)) + _times(1 - y, jax.nn.softplus(z))
        return jnp.sum(terms, axis=self.event_axes())

    def _mean(self, z: Array) -> Array:
        return jax.nn.sigmoid(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        y = y.astype(z.dtype)  # y - p would lose the digits of a confident, correct logit
        return y * jax.nn.sigmoid(-z) - (1 - y) * jax.nn.sigmoid(z)

    def _variance(self, z: Array) -> Array:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)  # 1 - p would lose the digits of small 1 - p

    def _fisher(self, z: Array, u: Array) -> Array:
        return self._variance(z) * u

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        return jnp.sqrt(self._variance(z)) * w

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return jnp.sqrt(self._variance(z)) * u

    def _fisher_root(self, z: Array) -> Root:
        def score(targets: ArrayLike) -> Array:
            w = divide_above_rounding(-self.score(z, targets), self._variance(z))
            return flat_events(w, self.event_ndim)

        multiply = lambda w: self._sqrt_fisher(z, w)
        return Root(*unit_columns(multiply, z, self.event_ndim), score)

    def _kl(self, z: Array, z_new: Array) -> Array:
        p, q, d, softplus = jax.nn.sigmoid(z), jax.nn.sigmoid(-z), z_new - z, jax.nn.softplus
        # The second form, for close logits, is the one that does not cancel there.
        up, down = softplus(-z_new) - softplus(-z), softplus(z_new) - softplus(z)
        far = _times(p, up) + _times(q, down)
        near = jnp.abs(d) < 1
        d = jnp.where(near, d, 0)
        close = log_partition_gap(jnp.stack([p, q]), jnp.stack([q * d, -p * d]), (0,))
        return jnp.sum(jnp.where(near, close, far), axis=self.event_axes())


def _times(weight: Array, x: Array) -> Array:
    """The product, with 0 times anything that is not finite 0."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(x), 0, x)
