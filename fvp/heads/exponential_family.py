"""Any exponential family, given by its log-partition function and sufficient statistic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from fvp.heads.head import NaturalHead, check_event_ndim
from fvp.heads.symmetric_root import multiply, symmetric_root
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class ExponentialFamily(NaturalHead):
    """The densities exp(z.T(y) - A(z)) h(y); ``z`` are the natural parameters.

    nll = A(z) - z.T(y), without the base measure h, which no derivative and no divergence knows of;
    score = T(y) - grad A(z), F_R u = (Hessian of A) u, and the divergence is the Bregman one of A,
    KL(r(z) to r(z')) = A(z') - A(z) - grad A(z).(z' - z). S is the symmetric root of the Hessian of
    each example, by an eigendecomposition. All derivatives are JAX's: A has to be twice
    differentiable, and convex and finite at every z that the model gives.

    `mean` is E[T(y)] = grad A(z), of the shape of ``z``.

    Args:
      log_partition: A; maps the z of one example, of the event shape, to a scalar.
      sufficient_statistic: T; maps the target of one example to an array of the event shape.
        Targets have the batch axes of ``z`` first, then whatever axes T takes.
      sampler: ``sampler(key, z)`` draws the target of one example, for `sample` and what
        stands on it, such as `fvp.mc_fisher`; None where nothing draws.
      event_ndim: how many trailing axes of ``z`` make one example.

    Raises:
      ValueError: by `sample`, where there is no ``sampler``.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> gamma = fvp.ExponentialFamily(  # z = (shape - 1, -rate), y > 0
      ...     lambda z: jax.scipy.special.gammaln(z[0] + 1) - (z[0] + 1) * jnp.log(-z[1]),
      ...     lambda y: jnp.stack([jnp.log(y), y]),
      ... )
      >>> print(gamma.fisher(jnp.array([[1.0, -2.0]]), jnp.array([[0.0, 1.0]])))  # shape / rate^2
      [[0.5 0.5]]

    Reference:
      L. Brown, Fundamentals of Statistical Exponential Families, 1986.
    """

    log_partition: Callable[[Array], Array] = dataclasses.field(metadata={"static": True})
    sufficient_statistic: Callable[[Any], Array] = dataclasses.field(metadata={"static": True})
    sampler: Callable[[Array, Array], Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)
        for name in ("log_partition", "sufficient_statistic"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a function, got {getattr(self, name)!r}.")

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        event = jax.ShapeDtypeStruct(z.shape[z.ndim - self.event_ndim :], z.dtype)
        value = jax.eval_shape(self.log_partition, event)
        if jnp.shape(value) != ():
            raise ValueError(
                f"log_partition: expected a scalar for {name} of one example, of shape"
                f" {event.shape}, got shape {jnp.shape(value)}."
            )

    def _check_targets(self, z: ArrayOrShape, y: Array) -> None:
        batch, event = self.batch_shape(z), z.shape[z.ndim - self.event_ndim :]
        if y.shape[: len(batch)] != batch:
            raise ValueError(
                f"targets: ExponentialFamily expects the batch axes of z first, {batch}, got shape"
                f" {y.shape}."
            )
        target = jax.ShapeDtypeStruct(y.shape[len(batch) :], y.dtype)
        statistic = jax.eval_shape(self.sufficient_statistic, target)
        if jnp.shape(statistic) != event:
            raise ValueError(
                f"sufficient_statistic: expected the event shape of z, {event}, for the target of"
                f" one example, of shape {target.shape}, got shape {jnp.shape(statistic)}."
            )

    def _each(self, function: Callable[..., Any], z: Array) -> Callable[..., Any]:
        """``function`` of one example, over the batch axes of ``z``."""
        for _ in self.batch_shape(z):
            function = jax.vmap(function)
        return function

    def _statistic(self, z: Array, y: Array) -> Array:
        return self._each(self.sufficient_statistic, z)(y).astype(z.dtype)

    def _nll(self, z: Array, y: Array) -> Array:
        inner = jnp.sum(z * self._statistic(z, y), axis=self.event_axes())
        return self._each(self.log_partition, z)(z) - inner

    def _mean(self, z: Array) -> Array:
        return self._each(jax.grad(self.log_partition), z)(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        if self.sampler is None:
            raise ValueError(
                "sampler: ExponentialFamily draws no targets without one; give"
                " ExponentialFamily(..., sampler=lambda key, z: y) for one example."
            )
        batch = self.batch_shape(z)
        sample = self._each(self.sampler, z)(jax.random.split(key, batch), z)
        return sample.astype(dtype) if jnp.issubdtype(sample.dtype, jnp.floating) else sample

    def _score(self, z: Array, y: Array) -> Array:
        return self._statistic(z, y) - self._mean(z)

    def _fisher(self, z: Array, u: Array) -> Array:
        return jax.jvp(self._mean, (z,), (u,))[1]

    def _root(self, z: Array) -> Array:
        """The symmetric S of each example, (batch axes, D, D); A is convex up to rounding."""
        event = z.shape[z.ndim - self.event_ndim :]
        size = int(np.prod(event, dtype=int))

        def root(z: Array) -> Array:
            return symmetric_root(jax.hessian(self.log_partition)(z).reshape(size, size))

        return self._each(root, z)(z)

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        flat = w.reshape(*self.batch_shape(z), -1)
        return multiply("...ij,...j->...i", self._root(z), flat).reshape(z.shape)

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._sqrt_fisher(z, u)

    def _kl(self, z: Array, z_new: Array) -> Array:
        inner = lambda u, v: jnp.sum(u * v, axis=self.event_axes())
        value, d = self._each(self.log_partition, z), z_new - z
        terms = value(z_new), -value(z), -inner(self._mean(z), d)
        far, size = sum(terms), sum(map(jnp.abs, terms))
        # A third of the digits is lost: z_new is close, and Taylor's remainder loses none there.
        near = far < jnp.cbrt(jnp.finfo(z.dtype).eps) * size
        d = jnp.where(near.reshape(near.shape + (1,) * self.event_ndim), d, 0)
        close = sum(w * inner(d, self._fisher(z + t * d, d)) for t, w in _REMAINDER)
        return jnp.where(near, close, far)


def _remainder_rule(count: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes on [0, 1] with weights for the integral of (1 - t) f(t)."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    t = (nodes + 1) / 2
    return list(zip(t.tolist(), (weights / 2 * (1 - t)).tolist(), strict=True))


_REMAINDER = _remainder_rule(6)
