"""Counts of a fixed number of categorical draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from fvp.heads.head import NaturalHead
from fvp.heads.root import Root
from fvp.heads.softmax import Softmax
from fvp.typing import ArrayOrShape

_ONE_DRAW = Softmax()


@dataclasses.dataclass(frozen=True)
class Multinomial(NaturalHead):
    """Counts of ``total`` draws; ``z`` are logits of shape (batch axes, C), ``y`` like ``z``.

    With p = softmax(z) and n = total: nll = -sum_c y_c log p_c - log(n! / prod_c y_c!),
    score = y - n p, F_R u = n p (u - p.u), and S is sqrt(n) times that of `fvp.Softmax`.

    Rows of counts that do not sum to ``total`` count by their sum m, as at `fvp.Softmax`:
    n is m in the nll, the score is y - m p, the Hessian (m / n) F_R. Where the number of draws
    differs from example to example, take ``Softmax`` with rows y / n and ``weights`` n: the same
    Fisher, score and nll, but for the coefficient, on the scale of a mean over draws.

    Args:
      total: how many draws each example has; one positive number for all.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> head, z = fvp.Multinomial(total=8), jnp.zeros((1, 4))
      >>> print(head.mean(z), head.score(z, jnp.array([[8, 0, 0, 0]])))
      [[2. 2. 2. 2.]] [[ 6. -2. -2. -2.]]

    Reference:
      A. Agresti, Categorical Data Analysis, 2013, chapter 1.
    """

    total: Any

    def __post_init__(self) -> None:
        if jnp.ndim(self.total) != 0:
            raise ValueError(
                f"total: expected one number for all examples, got shape {jnp.shape(self.total)};"
                " where it differs, take Softmax with rows y / total and weights=total."
            )
        if not isinstance(self.total, Tracer) and not self.total >= 1:
            raise ValueError(f"total: expected one draw or more, got {self.total}.")

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        if z.shape[-1] < 2:
            raise ValueError(
                f"{name}: Multinomial expects two classes or more on the last axis, got shape"
                f" {z.shape}; binomial counts are those of two classes."
            )

    def _total(self, z: Array) -> Array:
        return jnp.asarray(self.total, z.dtype)

    def _relative_nll(self, z: Array, y: Array) -> Array:
        return _ONE_DRAW._nll(z, y.astype(z.dtype))

    def _nll(self, z: Array, y: Array) -> Array:
        y = y.astype(z.dtype)
        log_factorial = lambda n: jax.scipy.special.gammaln(n + 1)
        coefficient = log_factorial(jnp.sum(y, axis=-1)) - jnp.sum(log_factorial(y), axis=-1)
        return self._relative_nll(z, y) - coefficient

    def _mean(self, z: Array) -> Array:
        return self._total(z) * _ONE_DRAW._mean(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        draws = jnp.broadcast_to(self._total(z), z.shape[:-1])
        return jax.random.multinomial(key, draws, jax.nn.softmax(z)).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        return _ONE_DRAW._score(z, y.astype(z.dtype))

    def _fisher(self, z: Array, u: Array) -> Array:
        return self._total(z) * _ONE_DRAW._fisher(z, u)

    def _target_count(self, z: Array, y: Array) -> Array:
        return jnp.sum(y.astype(z.dtype), axis=-1) / self._total(z)

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        return jnp.sqrt(self._total(z)) * _ONE_DRAW._sqrt_fisher(z, w)

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return jnp.sqrt(self._total(z)) * _ONE_DRAW._sqrt_fisher_transpose(z, u)

    def _fisher_root(self, z: Array) -> Root:
        draws = lambda: jnp.broadcast_to(self._total(z), z.shape[:-1])
        counts = lambda y: jnp.asarray(y).astype(z.dtype)
        root = _ONE_DRAW._fisher_root(z)
        assert root.score is not None
        score = root.score
        return root._replace(score=lambda y: score(counts(y))).scaled(draws, 1)

    def _kl(self, z: Array, z_new: Array) -> Array:
        return self._total(z) * _ONE_DRAW._kl(z, z_new)
