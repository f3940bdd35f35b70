"""Student's t distribution over its location, with known scale: robust regression."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.event_fields import check_fits_event, check_positive
from fvp.heads.head import Head, check_event_ndim
from fvp.heads.root import Root, flat_events, unit_columns
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class StudentT(Head):
    """Independent Student-t outputs; ``z`` is the location, ``y`` of the shape of ``z``.

    With r = (y - z) / scale: nll = (df + 1)/2 log(1 + r^2 / df) + constants,
    score = (df + 1) r / ((df + r^2) scale), and F_R u = (df + 1) / ((df + 3) scale^2) u. The
    location is no natural parameter: the Hessian (df + 1)(df - r^2) / ((df + r^2)^2 scale^2) is
    negative at outliers, r^2 > df, where the Fisher is positive; prefer ``fvp.fisher`` to
    ``fvp.ggn`` here. The mean is ``z`` for df > 1.

    Args:
      df: degrees of freedom; a number, or an array that broadcasts to the event shape.
      scale: scale (not the standard deviation), likewise.
      event_ndim: how many trailing axes of ``z`` make one example (its outputs).

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> head, z, u = fvp.StudentT(df=1.0), jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> print(head.fisher(z, u), head.hessian(z, 3 + z, u).round(2))
      [[0.5]] [[-0.16]]

    Reference:
      K. Lange, R. Little, J. Taylor, Robust statistical modeling using the t distribution, 1989.
    """

    df: Any
    scale: Any = 1.0
    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)
        check_positive(self.df, "df", "positive degrees of freedom", self.event_ndim)
        check_positive(self.scale, "scale", "a positive scale", self.event_ndim)

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        check_fits_event(self.df, "df", "StudentT", z, self.event_ndim, name)
        check_fits_event(self.scale, "scale", "StudentT", z, self.event_ndim, name)

    def _fields(self, z: Array) -> tuple[Array, Array]:
        """Degrees of freedom and scale in the dtype of ``z``."""
        return jnp.asarray(self.df, z.dtype), jnp.asarray(self.scale, z.dtype)

    def _relative_nll(self, z: Array, y: Array) -> Array:
        df, scale = self._fields(z)
        r = (y.astype(z.dtype) - z) / scale
        return jnp.sum((df + 1) / 2 * jnp.log1p(r * r / df), axis=self.event_axes())

    def _nll(self, z: Array, y: Array) -> Array:
        df, scale = self._fields(z)
        constant = jnp.log(scale) + 0.5 * jnp.log(math.pi * df) - _log_gamma_ratio(df / 2)
        constants = jnp.broadcast_to(constant, z.shape)
        return self._relative_nll(z, y) + jnp.sum(constants, axis=self.event_axes())

    def _mean(self, z: Array) -> Array:
        return z

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        df, scale = self._fields(z)
        return (z + scale * jax.random.t(key, df, z.shape, z.dtype)).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        df, scale = self._fields(z)
        r = (y.astype(z.dtype) - z) / scale
        return (df + 1) * r / ((df + r * r) * scale)

    def _fisher(self, z: Array, u: Array) -> Array:
        df, scale = self._fields(z)
        return (df + 1) / ((df + 3) * scale**2) * u

    def _hessian(self, z: Array, y: Array, u: Array) -> Array:
        df, scale = self._fields(z)
        r = (y.astype(z.dtype) - z) / scale
        within = df + r * r
        return (df + 1) / within * ((df - r * r) / within) / scale**2 * u

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        df, scale = self._fields(z)
        return jnp.sqrt((df + 1) / (df + 3)) / scale * w

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._sqrt_fisher(z, u)

    def _fisher_root(self, z: Array) -> Root:
        def score(targets: ArrayLike) -> Array:
            w = -self.score(z, targets) / self._sqrt_fisher(z, jnp.ones_like(z))
            return flat_events(w, self.event_ndim)

        multiply = lambda w: self._sqrt_fisher(z, w)
        return Root(*unit_columns(multiply, z, self.event_ndim), score)

    def _kl(self, z: Array, z_new: Array) -> Array:
        df, scale = self._fields(z)
        shift = jnp.abs(z_new - z) / (scale * jnp.sqrt(df))
        near = shift < 0.5
        close = _close_divergence(df, jnp.where(near, shift, 0))
        far = _far_divergence(df, jnp.where(near, 1, shift))
        return jnp.sum((df + 1) / 2 * jnp.where(near, close, far), axis=self.event_axes())


def _log_gamma_ratio(a: Array) -> Array:
    """The value of log Gamma(a + 1/2) / Gamma(a), also where the two logarithms cancel."""
    log_gamma, inverse = jax.scipy.special.gammaln, 1 / jnp.maximum(a, 50)
    series = -inverse / 8 + inverse**3 / 192 - inverse**5 / 640
    return jnp.where(a < 50, log_gamma(a + 0.5) - log_gamma(a), 0.5 * jnp.log(a) + series)


# With y = scale sqrt(df) tan(theta), KL = (df + 1)/2 E log(1 + shift sin(2 theta) + shift^2
# cos^2(theta)), where the density of theta goes as cos(theta)^(df - 1). It is elementary for odd df
# alone; both forms below are exact to rounding where they are used.


def _close_divergence(df: Array, shift: Array) -> Array:
    """Its Fourier series, log(1 + shift^2 / 4) + 2 sum_k (-1)^(k+1) c_k Re(w^k) / k.

    |w| = shift / sqrt(4 + shift^2) is below 1/4, and c_k = E cos(2 k theta).
    """
    half, side = (df + 1) / 2, jnp.sqrt(1 + shift * shift / 4)
    cosine, sine = shift / 2 / side, 1 / side
    total = jnp.log1p(shift * shift / 4)
    # w = cosine (cosine + i sine), its powers in real and imaginary parts.
    coefficient, power, turned = jnp.ones_like(half), jnp.ones_like(shift), jnp.zeros_like(shift)
    for k in range(1, 25):  # 1/4^24 is the rounding of float64
        coefficient = coefficient * (k - half) / (half + k - 1)
        real = cosine * (cosine * power - sine * turned)
        power, turned = real, cosine * (sine * power + cosine * turned)
        total = total - 2 / k * coefficient * power
    return total


def _far_divergence(df: Array, shift: Array) -> Array:
    """Re E log(1 - kappa C), where C = cos^2(theta) ~ Beta(df/2, 1/2), kappa = 1 + (shift + i)^2.

    By the trapezoidal rule over x, C = 1 / (1 + e^-t) and t = log(1 + df) + 3 sinh(x) + i pi/4: on
    that line, away from the zero of the logarithm, it converges exponentially at every shift.
    The relative error is below 1e-8 for df from 1 to 1e6 and shifts from 0.5 to 1e4.
    """
    x = np.arange(-4.5, 4.5, 0.05)
    t = jnp.log1p(df)[..., None] + 3 * np.sinh(x).astype(shift.dtype) + 0.25j * math.pi
    log_c, log_rest = _log_sigmoid(t), _log_sigmoid(-t)
    density = jnp.exp(df[..., None] / 2 * log_c + log_rest / 2) * np.cosh(x).astype(shift.dtype)
    kappa = 1 + (shift + 1j) ** 2
    logs = jnp.log(1 - kappa[..., None] * jnp.exp(log_c))
    return jnp.sum(jnp.real(density * logs), -1) / jnp.sum(jnp.real(density), -1)


def _log_sigmoid(t: Array) -> Array:
    """The value of -log(1 + e^-t), for complex ``t``."""
    positive = jnp.real(t) > 0
    decay = jnp.log1p(jnp.exp(jnp.where(positive, -t, t)))
    return jnp.where(positive, -decay, t - decay)
