"""Distribution objects of other libraries as heads."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from fvp.checks import check_positive_int
from fvp.heads.head import Head, check_event_ndim, exp_excess
from fvp.heads.symmetric_root import multiply, symmetric_root
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class FromDistribution(Head):
    r"""The head of a distribution object, of NumPyro, Distrax or the like.

    nll = -log_prob(y), summed over independent components (the ``batch_shape`` of the object); its
    derivatives are JAX's, and z need not be the natural parameter. F_R = E_y[score score^T] is, in
    this order,

    - ``fisher_matrix(z)``, a closed form, if you give one;
    - the exact sum over all outcomes: over ``support``, or ``enumerate_support()`` where the object
      says that it has that;
    - the mean over ``num_samples`` draws with ``key``, if you ask for it: the same draws in every
      call, by position in the batch, so that ``chunk_size`` changes them;
    - else an error. `fvp.mc_fisher`, and K-FAC with its own samples, need none of these.

    KL is found likewise, from ``divergence``, by the sum over outcomes, or by draws. S is the
    symmetric root of F_R of each example.

    Args:
      make_distribution: maps the z of one example, of the event shape, to a distribution of its
        target: an object with ``log_prob(y)``, ``sample(key)`` or ``sample(seed=key)``, ``mean``,
        ``batch_shape`` and ``event_shape``. Made anew inside every trace.
      support: all outcomes of one component, on the first axis of an array.
      fisher_matrix: F_R of one example, (D, D) for the D entries of its z.
      divergence: KL(r(z) to r(z_new)) of one example, ``divergence(z, z_new)``.
      num_samples: draws of each example, with ``key``.
      key: a ``jax.random`` key.
      event_ndim: how many trailing axes of ``z`` make one example.

    Raises:
      ValueError: by what needs F_R or KL, where there is no way to it.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> class Geometric:  # NumPyro's dist.GeometricLogits does as well
      ...     batch_shape = event_shape = ()
      ...     def __init__(self, logit):
      ...         self.logit = logit
      ...     def log_prob(self, y):
      ...         return -jax.nn.softplus(-self.logit) - y * jax.nn.softplus(self.logit)
      >>> head = fvp.FromDistribution(
      ...     lambda z: Geometric(z[0]), fisher_matrix=lambda z: jax.nn.sigmoid(-z)[None]
      ... )
      >>> z = jnp.zeros((1, 1))
      >>> print(head.score(z, jnp.array([3])), head.fisher(z, z + 1))
      [[-1.]] [[0.5]]
    """

    make_distribution: Callable[[Array], Any] = dataclasses.field(metadata={"static": True})
    support: Any = None
    fisher_matrix: Callable[[Array], Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    divergence: Callable[[Array, Array], Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    num_samples: int | None = dataclasses.field(default=None, metadata={"static": True})
    key: Any = None
    event_ndim: int = 1

    def __post_init__(self) -> None:
        check_event_ndim(self.event_ndim)
        if not callable(self.make_distribution):
            raise TypeError(
                "make_distribution: expected a function of z that makes a distribution, got"
                f" {self.make_distribution!r}."
            )
        if (self.num_samples is None) != (self.key is None):
            raise ValueError("num_samples, key: FromDistribution takes both or none of them.")
        if self.num_samples is not None:
            check_positive_int(self.num_samples, "num_samples")

    def _check_targets(self, z: ArrayOrShape, y: Array) -> None:
        expected = self.batch_shape(z) + self._target_shape(z)
        if y.shape != expected:
            raise ValueError(
                f"targets: expected shape {expected}, the batch axes of z and the shape of the"
                f" distribution, got {y.shape}."
            )

    def _target_shape(self, z: ArrayOrShape) -> tuple[int, ...]:
        """The shape of one target: components, then the event of the distribution."""
        shapes = []

        def look(z: Array) -> None:
            distribution = self.make_distribution(z)
            shapes.append((*distribution.batch_shape, *distribution.event_shape))

        jax.eval_shape(look, jax.ShapeDtypeStruct(z.shape[z.ndim - self.event_ndim :], z.dtype))
        return shapes[0]

    def _each(self, function: Callable[..., Any], z: Array) -> Callable[..., Any]:
        """``function`` of one example, over the batch axes of ``z``."""
        for _ in self.batch_shape(z):
            function = jax.vmap(function)
        return function

    def _log_prob(self, z: Array, y: Array) -> Array:
        """Of one example, a scalar."""
        return jnp.sum(self.make_distribution(z).log_prob(y))

    def _nll(self, z: Array, y: Array) -> Array:
        return -self._each(self._log_prob, z)(z, y)

    def _mean(self, z: Array) -> Array:
        return self._each(lambda z: _value(self.make_distribution(z).mean), z)(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        keys = jax.random.split(key, self.batch_shape(z))
        y = self._each(self._draw, z)(keys, z)
        return y.astype(dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y

    def _draw(self, key: Array, z: Array) -> Array:
        """One target of one example."""
        distribution = self.make_distribution(z)
        keyword = "seed" in inspect.signature(distribution.sample).parameters
        return distribution.sample(seed=key) if keyword else distribution.sample(key)

    def _score(self, z: Array, y: Array) -> Array:
        return self._each(jax.grad(self._log_prob), z)(z, y)

    def _hessian(self, z: Array, y: Array, u: Array) -> Array:
        return -jax.jvp(lambda z: self._score(z, y), (z,), (u,))[1]

    def _outcomes(self, z: Array) -> Array | None:
        """All outcomes of one example's components, (K, components, event); None if not known."""
        distribution = self.make_distribution(z)
        shape = (*distribution.batch_shape, *distribution.event_shape)
        if self.support is not None:
            outcomes = jnp.asarray(self.support)
            between = (1,) * len(distribution.batch_shape)
            outcomes = outcomes.reshape(outcomes.shape[0], *between, *outcomes.shape[1:])
            return jnp.broadcast_to(outcomes, (outcomes.shape[0], *shape))
        if getattr(distribution, "has_enumerate_support", False):
            return distribution.enumerate_support()
        return None

    def _draws(self, what: str, key: Array, z: Array) -> Array:
        """The draws of one example that the user asked for, (S, components, event)."""
        if self.num_samples is None:
            raise ValueError(
                f"make_distribution: the outcomes of this distribution can't be counted, and its"
                f" {what} is not known. Give FromDistribution {_WAYS[what]}=, support= or"
                " num_samples= and key=, or take fvp.mc_fisher."
            )
        return jax.vmap(lambda key: self._draw(key, z))(jax.random.split(key, self.num_samples))

    def _keys(self, z: Array) -> Array:
        key = jax.random.key(0) if self.key is None else self.key  # nothing is drawn without one
        return jax.random.split(key, self.batch_shape(z))

    def _fisher_of_one(self, key: Array, z: Array) -> Array:
        """F_R of one example, (D, D)."""
        if self.fisher_matrix is not None:
            return self.fisher_matrix(z).astype(z.dtype)
        outcomes = self._outcomes(z)
        if outcomes is None:
            draws = self._draws("Fisher", key, z)
            scores = jax.vmap(jax.grad(self._log_prob), (None, 0))(z, draws)
            scores = scores.reshape(scores.shape[0], -1) / math.sqrt(scores.shape[0])
            return multiply("ki,kj->ij", scores, scores)
        # Components are independent and their scores of mean zero: the covariances add up.
        log_prob = lambda z: self.make_distribution(z).log_prob(outcomes).ravel()
        scores = jax.jacobian(log_prob)(z).reshape(-1, z.size)
        probabilities = jnp.exp(log_prob(z))
        possible = probabilities[:, None] > 0
        scores = jnp.where(possible, scores, 0)
        return multiply("k,ki,kj->ij", probabilities, scores, scores)

    def _fisher(self, z: Array, u: Array) -> Array:
        matrix = self._each(self._fisher_of_one, z)(self._keys(z), z)
        flat = u.reshape(*self.batch_shape(z), -1)
        return multiply("...ij,...j->...i", matrix, flat).reshape(z.shape)

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        root = lambda key, z: symmetric_root(self._fisher_of_one(key, z))
        flat = w.reshape(*self.batch_shape(z), -1)
        roots = self._each(root, z)(self._keys(z), z)
        return multiply("...ij,...j->...i", roots, flat).reshape(z.shape)

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._sqrt_fisher(z, u)

    def _kl(self, z: Array, z_new: Array) -> Array:
        return self._each(self._kl_of_one, z)(self._keys(z), z, z_new)

    def _kl_of_one(self, key: Array, z: Array, z_new: Array) -> Array:
        if self.divergence is not None:
            return self.divergence(z, z_new)
        outcomes, draws = self._outcomes(z), None
        if outcomes is None:
            outcomes = draws = self._draws("KL divergence", key, z)
        log_p, log_q = (self.make_distribution(x).log_prob(outcomes) for x in (z, z_new))
        # E_p[e^d - 1 - d], since E_p[e^d] = 1: every term is positive, and nothing cancels.
        d = jnp.where(log_p == -jnp.inf, 0, log_q - log_p)
        p = 1 / draws.shape[0] if draws is not None else jnp.exp(log_p)
        near = jnp.abs(d) < 1
        far = p * (jnp.exp(jnp.where(near, 0, d)) - 1) - p * d
        return jnp.sum(jnp.where(near, p * exp_excess(jnp.where(near, d, 0)), far))


_WAYS = {"Fisher": "fisher_matrix", "KL divergence": "divergence"}


def _value(mean: Any) -> Any:
    """A property of NumPyro's, a method of Distrax's."""
    return mean() if callable(mean) else mean
