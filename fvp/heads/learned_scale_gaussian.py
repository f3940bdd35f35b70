"""The normal distribution over its mean and the logarithm of its scale."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from fvp.heads.head import Head, exp_excess
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class LearnedScaleGaussian(Head):
    """Normal distribution whose noise the model predicts; ``z`` = (..., 2), ``y`` = (...).

    z = (m, s) are the mean and the log standard deviation of one target: with r = (y - m) / e^s,
    nll = r^2 / 2 + s + log(2 pi) / 2. They are not the natural parameters, so the Fisher
    F_R = diag(e^(-2 s), 2), positive definite, is not the Hessian of the nll, which has the rows
    (e^(-2 s), 2 r e^-s) and (2 r e^-s, 2 r^2), determinant -2 r^2 e^(-2 s), and is indefinite
    wherever r is not 0: prefer ``fvp.fisher`` to ``fvp.ggn`` here.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> z, u = jnp.zeros((1, 2)), jnp.ones((1, 2))
      >>> head, y = fvp.LearnedScaleGaussian(), jnp.array([1.0])
      >>> print(head.fisher(z, u), head.hessian(z, y, u))
      [[1. 2.]] [[3. 4.]]
    """

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        if z.shape[-1] != 2:
            raise ValueError(
                f"{name}: LearnedScaleGaussian expects (mean, log standard deviation) on the last"
                f" axis, of length 2, got shape {z.shape}."
            )

    def _check_targets(self, z: ArrayOrShape, y: Array) -> None:
        if y.shape != self.batch_shape(z):
            raise ValueError(
                f"targets: LearnedScaleGaussian expects shape {self.batch_shape(z)} for z of shape"
                f" {z.shape}, got {y.shape}."
            )

    def _relative_nll(self, z: Array, y: Array) -> Array:
        r = _residual(z, y)
        return 0.5 * r * r + z[..., 1]

    def _nll(self, z: Array, y: Array) -> Array:
        return self._relative_nll(z, y) + 0.5 * math.log(2 * math.pi)

    def _mean(self, z: Array) -> Array:
        return z[..., 0]

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        noise = jax.random.normal(key, z.shape[:-1], z.dtype)
        return (z[..., 0] + jnp.exp(z[..., 1]) * noise).astype(dtype)

    def _score(self, z: Array, y: Array) -> Array:
        r = _residual(z, y)
        return _pair(r * jnp.exp(-z[..., 1]), r * r - 1)

    def _fisher(self, z: Array, u: Array) -> Array:
        return _pair(jnp.exp(-2 * z[..., 1]) * u[..., 0], 2 * u[..., 1])

    def _hessian(self, z: Array, y: Array, u: Array) -> Array:
        r, precision_root = _residual(z, y), jnp.exp(-z[..., 1])
        mixed = 2 * r * precision_root
        first = precision_root**2 * u[..., 0] + mixed * u[..., 1]
        return _pair(first, mixed * u[..., 0] + 2 * r * r * u[..., 1])

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        return _pair(jnp.exp(-z[..., 1]) * w[..., 0], math.sqrt(2) * w[..., 1])

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._sqrt_fisher(z, u)

    def _kl(self, z: Array, z_new: Array) -> Array:
        # log ratio + (ratio^2 - 1) / 2 in the form that does not cancel for close scales.
        ratio = -2 * (z_new[..., 1] - z[..., 1])
        moved = (z_new[..., 0] - z[..., 0]) * jnp.exp(-z_new[..., 1])
        return 0.5 * (exp_excess(ratio) + moved * moved)


def _residual(z: Array, y: Array) -> Array:
    """(y - m) / e^s."""
    return (y.astype(z.dtype) - z[..., 0]) * jnp.exp(-z[..., 1])


def _pair(mean: Array, log_scale: Array) -> Array:
    return jnp.stack([mean, log_scale], axis=-1)
