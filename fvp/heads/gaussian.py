"""The normal distribution over its mean, with known noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.event_fields import check_fits_event, check_positive
from fvp.heads.head import NaturalHead, check_event_ndim
from fvp.heads.root import Root, flat_events, unit_columns
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class Gaussian(NaturalHead):
    """Normal distribution with known noise; ``z`` is the mean, ``y`` of the shape of ``z``.

    F_R u = u / scale^2, or precision u; S = diag(1 / scale), or the Cholesky factor of precision.
    With ``scale=1`` the loss is half the squared error, summed over the event axes and averaged
    over examples, plus a constant.

    Args:
      scale: standard deviation; a number, or an array that broadcasts to the event shape.
      precision: symmetric positive definite (D, D) inverse covariance, instead of ``scale``;
        takes ``event_ndim=1``.
      event_ndim: how many trailing axes of ``z`` make one example (its outputs).

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> print(fvp.Gaussian(scale=2.0).fisher(jnp.zeros((1, 3)), jnp.ones((1, 3))))
      [[0.25 0.25 0.25]]
    """

    scale: Any = None
    precision: Any = None
    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)
        if self.precision is None:
            if self.scale is None:
                object.__setattr__(self, "scale", 1.0)
            what = "a positive standard deviation"
            check_positive(self.scale, "scale", what, self.event_ndim)
        elif self.scale is not None:
            raise ValueError("scale, precision: Gaussian takes one of the two, got both.")
        elif self.event_ndim != 1:
            raise ValueError(
                f"event_ndim: a precision matrix expects event_ndim=1, got {self.event_ndim}."
            )
        else:
            _check_precision(self.precision)

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        if self.precision is not None:
            event = z.shape[z.ndim - self.event_ndim :]
            if jnp.shape(self.precision) != event * 2:
                raise ValueError(
                    f"{name}: Gaussian(precision of shape {jnp.shape(self.precision)}) expects"
                    f" {jnp.shape(self.precision)[-1]} outputs on the last axis, got shape"
                    f" {z.shape}."
                )
            return
        check_fits_event(self.scale, "scale", "Gaussian", z, self.event_ndim, name)

    def _multiply(self, factor: Any, x: Array) -> Array:
        """The matrix times x on the last axis, at full precision on every device."""
        return jnp.einsum("ij,...j->...i", factor, x, precision=jax.lax.Precision.HIGHEST)

    def _root(self, dtype: DTypeLike) -> Array:
        """S as a lower triangular matrix, precision = S S^T."""
        return jnp.linalg.cholesky(jnp.asarray(self.precision, dtype))

    def _scale(self, dtype: DTypeLike) -> Array:
        return jnp.asarray(self.scale, dtype)

    def _relative_nll(self, z: Array, y: Array) -> Array:
        whitened = self._sqrt_fisher_transpose(z, z - y.astype(z.dtype))
        return 0.5 * jnp.sum(whitened * whitened, axis=self.event_axes())

    def _nll(self, z: Array, y: Array) -> Array:
        event = z.shape[z.ndim - self.event_ndim :]
        if self.precision is not None:
            log_scale = -jnp.sum(jnp.log(jnp.diagonal(self._root(z.dtype))))
        else:
            log_scale = jnp.sum(jnp.broadcast_to(jnp.log(self._scale(z.dtype)), event))
        constant = log_scale + 0.5 * math.log(2 * math.pi) * math.prod(event)
        return self._relative_nll(z, y) + constant

    def _mean(self, z: Array) -> Array:
        return z

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        noise = jax.random.normal(key, z.shape, z.dtype)
        if self.precision is None:
            return (z + self._scale(z.dtype) * noise).astype(dtype)
        inverse_root = jnp.linalg.inv(self._root(z.dtype))
        return (z + self._multiply(inverse_root.T, noise)).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        return self._fisher(z, y.astype(z.dtype) - z)

    def _fisher(self, z: Array, u: Array) -> Array:
        if self.precision is not None:
            return self._multiply(jnp.asarray(self.precision, z.dtype), u)
        return u / self._scale(z.dtype) ** 2

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        if self.precision is not None:
            return self._multiply(self._root(z.dtype), w)
        return w / self._scale(z.dtype)

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        if self.precision is not None:
            return self._multiply(self._root(z.dtype).T, u)
        return u / self._scale(z.dtype)

    def _fisher_root(self, z: Array) -> Root:
        def score(targets: ArrayLike) -> Array:
            difference = z - jnp.asarray(targets).astype(z.dtype)
            return flat_events(self._sqrt_fisher_transpose(z, difference), self.event_ndim)

        multiply = lambda w: self._sqrt_fisher(z, w)
        return Root(*unit_columns(multiply, z, self.event_ndim), score)

    def _kl(self, z: Array, z_new: Array) -> Array:
        whitened = self._sqrt_fisher_transpose(z, z_new - z)
        return 0.5 * jnp.sum(whitened * whitened, axis=self.event_axes())


def _check_precision(precision: Any) -> None:
    shape = jnp.shape(precision)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"precision: expected a square (D, D) matrix, got shape {shape}.")
    if isinstance(precision, Tracer):
        return
    matrix = np.asarray(precision, np.float64)
    if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6 * np.abs(matrix).max()):
        raise ValueError("precision: expected a symmetric matrix, got one that is not.")
    if np.linalg.eigvalsh(matrix).min() <= 0:
        raise ValueError("precision: expected a positive definite matrix, got one that is not.")
