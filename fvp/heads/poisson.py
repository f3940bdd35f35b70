"""Independent counts over log rates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.head import NaturalHead, check_event_ndim, exp_excess
from fvp.heads.root import Root, flat_events, unit_columns
from fvp.numerics import divide_above_rounding


@dataclasses.dataclass(frozen=True)
class Poisson(NaturalHead):
    """Independent Poisson outputs; ``z`` are log rates, ``y`` counts of the shape of ``z``.

    With the rate m = e^z: nll = m - y z + log y!, score = y - m, F_R u = m u, S = diag sqrt(m), and
    KL(r(z) to r(z')) = m (e^d - 1 - d) with d = z' - z. An exposure t is part of the model: z =
    log t + its log rate.

    Rates end at the square root of the largest number of the dtype that is computed in (z = 44 in
    float32, 354 in float64), so that products of them stay finite; nll is then linear in ``z``
    and its derivatives are still those above. Targets may be any numbers of 0 or more.

    Args:
      event_ndim: how many trailing axes of ``z`` make one example (its outputs). With 0 every
        entry of ``z`` is an example.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> head, z = fvp.Poisson(), jnp.log(jnp.array([[1.0, 4.0]]))
      >>> print(head.score(z, jnp.array([[0, 6]])), head.fisher(z, jnp.ones((1, 2))))
      [[-1.  2.]] [[1. 4.]]

    Reference:
      P. McCullagh, J. Nelder, Generalized Linear Models, 1989, chapter 6.
    """

    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)

    def _relative_nll(self, z: Array, y: Array) -> Array:
        return jnp.sum(_rate(z) - y.astype(z.dtype) * z, axis=self.event_axes())

    def _nll(self, z: Array, y: Array) -> Array:
        log_factorial = jax.scipy.special.gammaln(y.astype(z.dtype) + 1)
        return self._relative_nll(z, y) + jnp.sum(log_factorial, axis=self.event_axes())

    def _mean(self, z: Array) -> Array:
        return _rate(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        return jax.random.poisson(key, _rate(z)).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        return y.astype(z.dtype) - _rate(z)

    def _fisher(self, z: Array, u: Array) -> Array:
        return _rate(z) * u

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        return jnp.sqrt(_rate(z)) * w

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._sqrt_fisher(z, u)

    def _fisher_root(self, z: Array) -> Root:
        def score(targets: ArrayLike) -> Array:
            w = divide_above_rounding(-self.score(z, targets), _rate(z))
            return flat_events(w, self.event_ndim)

        multiply = lambda w: self._sqrt_fisher(z, w)
        return Root(*unit_columns(multiply, z, self.event_ndim), score)

    def _kl(self, z: Array, z_new: Array) -> Array:
        d = z_new - z
        near = jnp.abs(d) < 1
        close = _rate(z) * exp_excess(jnp.where(near, d, 0))
        far = _rate(z_new) - _rate(z) - _rate(z) * d
        return jnp.sum(jnp.where(near, close, far), axis=self.event_axes())


@jax.custom_jvp
def _rate(z: Array) -> Array:
    """The value of e^z, up to the square root of the largest number."""
    return jnp.exp(jnp.minimum(z, 0.5 * math.log(jnp.finfo(z.dtype).max)))


@_rate.defjvp
def _rate_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Its own derivative beyond the bound as well: a gradient of zero there would stop an optimizer.
    rate = _rate(*primals)
    return rate, rate * tangents[0]
