"""What every output distribution provides, and the checks and casts that all of them share."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.numerics import widen

H = TypeVar("H", bound="Head")


class Head(abc.ABC):
    """An output distribution r(y given z) over its natural parameter ``z``.

    ``z`` has shape ``batch axes + event axes``; the last ``event_ndim`` axes make one example.
    Every method is batched over the batch axes, computes in float32 or wider and returns the dtype
    of ``z``. A head is a frozen record and a pytree: its numeric fields may be numbers, arrays or
    tracers, and a head of plain numbers is hashable and can be a static argument of ``jax.jit``.

    A new head implements the underscored methods, which see ``z`` in the computing dtype.
    """

    event_ndim: int

    def nll(self, z: Array, y: ArrayLike) -> Array:
        """-log r(y given z), normalising constants included; shape = batch axes."""
        y = self.check_targets(z, y)
        return self._nll(widen(z), y).astype(z.dtype)

    def mean(self, z: Array) -> Array:
        """E[y given z]; shape of ``z``."""
        self.check_outputs(z)
        return self._mean(widen(z)).astype(z.dtype)

    def sample(self, key: Array, z: Array) -> Array:
        """One y ~ r(. given z) for each example, in the form that :meth:`nll` takes."""
        self.check_outputs(z)
        return self._sample(key, widen(z), z.dtype)

    def score(self, z: Array, y: ArrayLike) -> Array:
        """Gradient of log r(y given z) with respect to ``z``; shape of ``z``."""
        y = self.check_targets(z, y)
        return self._score(widen(z), y).astype(z.dtype)

    def fisher(self, z: Array, u: Array) -> Array:
        """F_R(z) u, where F_R(z) = E_y[score score^T] over the head's own y; shape of ``z``."""
        self.check_outputs(z)
        return self._fisher(widen(z), widen(u)).astype(z.dtype)

    def hessian(self, z: Array, y: ArrayLike, u: Array) -> Array:
        """Hessian of :meth:`nll` in ``z``, times ``u``; shape of ``z``."""
        y = self.check_targets(z, y)
        return self._hessian(widen(z), y, widen(u)).astype(z.dtype)

    def hessian_factor(self, z: Array, y: Array) -> Array | None:
        """The c of each example with Hessian = c F_R(z), over the batch axes; None where it is 1.

        For heads over natural parameters; others override :meth:`_hessian` itself.
        """
        del z, y
        return None

    def sqrt_fisher(self, z: Array, w: Array) -> Array:
        """S w, where S S^T = F_R(z); ``w`` and the result have the shape of ``z``."""
        self.check_outputs(z)
        return self._sqrt_fisher(widen(z), widen(w)).astype(z.dtype)

    def sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        """S^T u, where S S^T = F_R(z); ``u`` and the result have the shape of ``z``."""
        self.check_outputs(z)
        return self._sqrt_fisher_transpose(widen(z), widen(u)).astype(z.dtype)

    def kl(self, z: Array, z_new: Array) -> Array:
        """KL(r(z) to r(z_new)), exact, keeping its digits when the two are close; batch axes."""
        self.check_outputs(z)
        self.check_outputs(z_new, "z_new")
        return self._kl(widen(z), widen(z_new)).astype(z.dtype)

    def batch_shape(self, z: Any) -> tuple[int, ...]:
        """The batch axes of ``z``: all axes before the event axes."""
        return z.shape[: z.ndim - self.event_ndim]

    def event_axes(self) -> tuple[int, ...]:
        """The event axes as negative axis numbers."""
        return tuple(range(-self.event_ndim, 0))

    def check_outputs(self, z: Any, name: str = "z") -> None:
        """Raises unless ``z`` is a floating-point array with a batch axis that fits this head."""
        kind = type(self).__name__
        if not hasattr(z, "shape") or not hasattr(z, "dtype"):
            raise TypeError(
                f"{name}: {kind} expects the model to return one array of shape (batch axes, event"
                f" axes), got {type(z).__name__}; return the logits or the mean alone."
            )
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise TypeError(
                f"{name}: {kind} expects a floating-point array of natural parameters (logits or"
                f" mean), got dtype {z.dtype}."
            )
        if z.ndim <= self.event_ndim:
            raise ValueError(
                f"{name}: {kind} expects at least one batch axis before its event axes"
                f" (event_ndim={self.event_ndim}), got shape {z.shape}. A model with one output per"
                " example returns z[:, None]; a single example is z[None]."
            )
        if 0 in z.shape:
            raise ValueError(
                f"{name}: expected a batch of at least one example and output, got {z.shape}."
            )
        self._check_event(z, name)

    def check_targets(self, z: Any, y: ArrayLike) -> Array:
        """Raises unless the targets ``y`` fit ``z``; returns them as an array."""
        self.check_outputs(z)
        y = jnp.asarray(y)
        self._check_targets(z, y)
        return y

    def _check_event(self, z: Any, name: str) -> None:
        """Raises when the event axes of ``z`` do not fit the head's own fields."""
        del z, name

    def _check_targets(self, z: Any, y: Array) -> None:
        if y.shape != z.shape:
            raise ValueError(
                f"targets: {type(self).__name__} expects one target for each output, shape"
                f" {z.shape} as z, got shape {y.shape}."
            )

    @abc.abstractmethod
    def _nll(self, z: Array, y: Array) -> Array: ...

    @abc.abstractmethod
    def _mean(self, z: Array) -> Array: ...

    @abc.abstractmethod
    def _sample(self, key: Array, z: Array, dtype: Any) -> Array: ...

    @abc.abstractmethod
    def _score(self, z: Array, y: Array) -> Array: ...

    @abc.abstractmethod
    def _fisher(self, z: Array, u: Array) -> Array: ...

    def _hessian(self, z: Array, y: Array, u: Array) -> Array:
        # z is the natural parameter: the Hessian of the log-partition function, up to how often
        # the targets count.
        product, factor = self._fisher(z, u), self.hessian_factor(z, y)
        if factor is None:
            return product
        return product * factor.reshape(factor.shape + (1,) * self.event_ndim)

    @abc.abstractmethod
    def _sqrt_fisher(self, z: Array, w: Array) -> Array: ...

    @abc.abstractmethod
    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array: ...

    @abc.abstractmethod
    def _kl(self, z: Array, z_new: Array) -> Array: ...


def register_head(cls: type[H]) -> type[H]:
    """Registers a frozen dataclass as a pytree: numeric fields are leaves, ``event_ndim`` static.

    The fields are validated where a person builds the head, in ``__post_init__``; JAX rebuilds
    heads with tracers and placeholders in them, so unflattening goes round the constructor.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    leaves = [name for name in names if name != "event_ndim"]

    def flatten(head: H) -> tuple[list[tuple[Any, Any]], int]:
        return [(jax.tree_util.GetAttrKey(n), getattr(head, n)) for n in leaves], head.event_ndim

    def unflatten(event_ndim: int, values: Any) -> H:
        head = object.__new__(cls)
        for name, value in zip(leaves, values, strict=True):
            object.__setattr__(head, name, value)
        if "event_ndim" in names:
            object.__setattr__(head, "event_ndim", event_ndim)
        return head

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def check_head(head: Any, hint: str = "") -> None:
    """Raises unless ``head`` is a head."""
    if isinstance(head, type) and issubclass(head, Head):
        raise TypeError(
            f"head: expected an instance such as fvp.{head.__name__}(), got the class"
            f" {head.__name__}{hint}."
        )
    if not isinstance(head, Head):
        raise TypeError(f"head: expected a head such as fvp.Softmax(), got {head!r}{hint}.")


def check_event_ndim(event_ndim: Any) -> None:
    """Raises unless ``event_ndim`` is a non-negative Python integer."""
    if isinstance(event_ndim, bool) or not isinstance(event_ndim, int):
        raise TypeError(f"event_ndim: expected an int, got {event_ndim!r}.")
    if event_ndim < 0:
        raise ValueError(f"event_ndim: expected 0 or more event axes, got {event_ndim}.")


def log_partition_gap(probabilities: Array, d: Array, axes: tuple[int, ...]) -> Array:
    """The value of log E_p[exp d] for deviations ``d`` with E_p[d] = 0, |d| at most about 1.

    This is the KL divergence between two nearby discrete distributions whose logits differ by d.
    Written as log1p E_p[exp d - 1 - d], because the terms of the textbook sum p (log p - log q)
    cancel: at KL = 1e-5 that leaves two digits in float32, this form five.
    """
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    excess = jnp.where(jnp.abs(d) < 0.01, series, jnp.expm1(d) - d)
    return jnp.log1p(jnp.sum(probabilities * excess, axis=axes))
