"""What every output distribution provides, and the checks and casts that all of them share.

The underscored methods are what a head implements; the public ones check, widen and cast around
them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.output_layout import OutputLayout
from fvp.heads.root import Root, unit_columns
from fvp.numerics import cast_like, widen_tree
from fvp.records import Record
from fvp.typing import ArrayOrShape

if TYPE_CHECKING:
    from jaxtyping import Float


class Head(Record, abc.ABC):
    """An output distribution r(y given z): the base of all heads, and of your own.

    ``z`` has shape ``batch axes + event axes``; the last ``event_ndim`` axes make one example.
    Every method is batched over the batch axes, computes in float32 or wider and returns the dtype
    of ``z``. A head is a frozen dataclass and a pytree: its fields are numbers, arrays or tracers,
    but for ``event_ndim`` and those marked ``dataclasses.field(metadata={"static": True})``.
    A head of plain numbers is hashable and can be a static argument of ``jax.jit``.

    Of a log-density, a sampler and a mean `FromDistribution` makes a head: try that first. A class
    of your own defines these methods, which see ``z`` in the computing dtype, and ``y`` as it came:

    - ``_nll(self, z, y)``: -log r(y given z), constants included and summed over the event axes,
      ``self.event_axes()``; the shape is that of the batch axes;
    - ``_mean(self, z)``: E[y given z], of the shape of targets;
    - ``_sample(self, key, z, dtype)``: one y for each example, as ``_nll`` takes it, in ``dtype``
      where it is floating-point;
    - ``_score(self, z, y)``: the gradient of log r(y given z) in z, of the shape of ``z``;
    - ``_fisher(self, z, u)``: F_R(z) u, where F_R = E_y[score score^T]; shape of ``z``, as ``u``;
    - ``_hessian(self, z, y, u)``: the Hessian of the nll times u; shape of ``z``. Where z is the
      natural parameter it is the Fisher: derive from `NaturalHead`, which has it;
    - ``_sqrt_fisher(self, z, w)`` and ``_sqrt_fisher_transpose(self, z, u)``: S w and S^T u, with
      S S^T = F_R(z); ``w``, ``u`` and the results have the shape of ``z``;
    - ``_kl(self, z, z_new)``: KL(r(z) to r(z_new)), over the batch axes.

    Targets that are not shaped like ``z`` override ``_check_targets``; a nll with normalising
    constants may give ``_relative_nll`` without them, on which steps are tried.

    Examples:
      In natural parameters:

      >>> import dataclasses, jax, jax.numpy as jnp, fvp
      >>> @dataclasses.dataclass(frozen=True)
      ... class Exponential(fvp.NaturalHead):
      ...     "y > 0 with rate -z, for z < 0; the mean is -1 / z, the variance 1 / z^2."
      ...     def _nll(self, z, y):
      ...         return jnp.sum(-z * y - jnp.log(-z), axis=self.event_axes())
      ...     def _mean(self, z):
      ...         return -1 / z
      ...     def _sample(self, key, z, dtype):
      ...         return (jax.random.exponential(key, z.shape) / -z).astype(dtype)
      ...     def _score(self, z, y):
      ...         return y + 1 / z
      ...     def _fisher(self, z, u):
      ...         return u / z**2
      ...     def _sqrt_fisher(self, z, w):
      ...         return -w / z
      ...     def _sqrt_fisher_transpose(self, z, u):
      ...         return -u / z
      ...     def _kl(self, z, z_new):
      ...         ratio = z_new / z
      ...         return jnp.sum(ratio - 1 - jnp.log(ratio), axis=self.event_axes())
      >>> x, w = jnp.array([[1.0], [2.0]]), jnp.array([[-0.5]])
      >>> F = fvp.fisher(lambda w, x: x @ w, Exponential(), w, x)
      >>> print(F @ jnp.ones((1, 1)))  # mean of x^2 / z^2 with z = -x / 2
      [[4.]]

      In others, with the methods held against derivatives and samples:

      >>> @dataclasses.dataclass(frozen=True)
      ... class NegativeBinomial(fvp.Head):
      ...     "Counts of the mean m = e^z and the variance m + m^2 / size."
      ...     size: float
      ...     def _nll(self, z, y):
      ...         log, r = jax.scipy.special.gammaln, self.size
      ...         nll = (y + r) * jnp.logaddexp(z, jnp.log(r)) - y * z - r * jnp.log(r)
      ...         constant = log(y + 1.0) + log(r) - log(y + r)
      ...         return jnp.sum(nll + constant, axis=self.event_axes())
      ...     def _mean(self, z):
      ...         return jnp.exp(z)
      ...     def _sample(self, key, z, dtype):
      ...         first, second = jax.random.split(key)
      ...         rate = jnp.exp(z) * jax.random.gamma(first, self.size, z.shape) / self.size
      ...         return jax.random.poisson(second, rate).astype(dtype)
      ...     def _score(self, z, y):
      ...         return (y - jnp.exp(z)) * self._weight(z)
      ...     def _fisher(self, z, u):
      ...         return jnp.exp(z) * self._weight(z) * u
      ...     def _hessian(self, z, y, u):
      ...         return (y + self.size) * self._weight(z) * (1 - self._weight(z)) * u
      ...     def _sqrt_fisher(self, z, w):
      ...         return jnp.sqrt(jnp.exp(z) * self._weight(z)) * w
      ...     def _sqrt_fisher_transpose(self, z, u):
      ...         return self._sqrt_fisher(z, u)
      ...     def _kl(self, z, z_new):
      ...         d, share = z_new - z, 1 - self._weight(z)
      ...         gap = jnp.log1p(share * jnp.expm1(d)) - share * d
      ...         return jnp.sum((jnp.exp(z) + self.size) * gap, axis=self.event_axes())
      ...     def _weight(self, z):
      ...         return self.size / (self.size + jnp.exp(z))
      >>> head, z, u = NegativeBinomial(2.0), jnp.ones((400_000, 1)), jnp.ones((400_000, 1))
      >>> y = 3 * u
      >>> nll = lambda z: head.nll(z, y).sum()
      >>> bool(jnp.allclose(head.score(z, y), -jax.grad(nll)(z)))
      True
      >>> hessian = jax.jvp(jax.grad(nll), (z,), (u,))[1]
      >>> bool(jnp.allclose(head.hessian(z, y, u), hessian))
      True
      >>> squares = head.sampled_score(jax.random.key(0), z) ** 2
      >>> bool(abs(squares.mean() / head.fisher(z, u).mean() - 1) < 0.02)
      True
      >>> divergence = jax.hessian(lambda d: head.kl(z[:1], z[:1] + d).sum())(0.0)
      >>> bool(jnp.allclose(divergence, head.fisher(z[:1], u[:1])))
      True
    """

    STATIC: ClassVar[frozenset[str]] = frozenset({"event_ndim"})

    event_ndim: int = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        new = {"_fisher", "_sqrt_fisher"} & vars(cls).keys()
        inherited = "_fisher_root" not in vars(cls) and cls._fisher_root is not Head._fisher_root
        if new and inherited:
            raise TypeError(
                f"{cls.__name__}: {sorted(new)[0]} is new, but _fisher_root that of another head;"
                " define it as well."
            )
        place = lambda name: next(i for i, c in enumerate(cls.__mro__) if name in vars(c))
        if place("_nll") < place("_relative_nll"):  # the latter is that of another nll
            cls._relative_nll = Head._relative_nll

    def nll(self, z: Float[Array, "*z"], y: ArrayLike) -> Float[Array, "*batch"]:
        """-log r(y given z), normalising constants included; shape = batch axes."""
        y = self.check_targets(z, y)
        return self._nll(widen_tree(z), y).astype(_dtype(z))

    def relative_nll(self, z: Float[Array, "*z"], y: ArrayLike) -> Float[Array, "*batch"]:
        """`nll` up to a term of ``y`` alone, beside which small changes would lose their digits."""
        y = self.check_targets(z, y)
        return self._relative_nll(widen_tree(z), y).astype(_dtype(z))

    def mean(self, z: Float[Array, "*z"]) -> Float[Array, "*z"]:
        """E[y given z]; the shape of targets, of ``z`` for Softmax."""
        self.check_outputs(z)
        return cast_like(self._mean(widen_tree(z)), z)

    def sample(self, key: Array, z: Array) -> Array:
        """One y ~ r(. given z) for each example, in the form that `nll` takes."""
        self.check_outputs(z)
        return self._sample(key, widen_tree(z), _dtype(z))

    def sampled_score(self, key: Array, z: Array) -> Array:
        """A random vector with E[s s^T] = F_R(z): the score at a sample; shape of ``z``."""
        return self.score(z, self.sample(key, z))

    def score(self, z: Float[Array, "*z"], y: ArrayLike) -> Float[Array, "*z"]:
        """Gradient of log r(y given z) with respect to ``z``; shape of ``z``."""
        y = self.check_targets(z, y)
        return cast_like(self._score(widen_tree(z), y), z)

    def fisher(self, z: Float[Array, "*z"], u: Float[Array, "*z"]) -> Float[Array, "*z"]:
        """F_R(z) u, where F_R(z) = E_y[score score^T] over the head's own y; shape of ``z``."""
        self.check_outputs(z)
        return cast_like(self._fisher(widen_tree(z), widen_tree(u)), z)

    def hessian(
        self, z: Float[Array, "*z"], y: ArrayLike, u: Float[Array, "*z"]
    ) -> Float[Array, "*z"]:
        """Hessian of `nll` in ``z``, times ``u``; shape of ``z``."""
        y = self.check_targets(z, y)
        return cast_like(self._hessian(widen_tree(z), y, widen_tree(u)), z)

    def sqrt_fisher(self, z: Float[Array, "*z"], w: Float[Array, "*z"]) -> Float[Array, "*z"]:
        """S w, where S S^T = F_R(z); ``w`` and the result have the shape of ``z``."""
        self.check_outputs(z)
        return cast_like(self._sqrt_fisher(widen_tree(z), widen_tree(w)), z)

    def sqrt_fisher_transpose(
        self, z: Float[Array, "*z"], u: Float[Array, "*z"]
    ) -> Float[Array, "*z"]:
        """S^T u, where S S^T = F_R(z); ``u`` and the result have the shape of ``z``."""
        self.check_outputs(z)
        return cast_like(self._sqrt_fisher_transpose(widen_tree(z), widen_tree(u)), z)

    def fisher_root(self, z: Array) -> Root:
        """The columns of S, S S^T = F_R(z); at most one for each output."""
        self.check_outputs(z)
        return self._fisher_root(widen_tree(z))

    def hessian_root(self, z: Array, y: ArrayLike) -> Root | None:
        """The columns of a root of the Hessian of `nll`; None where there is none known."""
        y = self.check_targets(z, y)
        return self._hessian_root(widen_tree(z), y)

    def kl(self, z: Float[Array, "*z"], z_new: Float[Array, "*z"]) -> Float[Array, "*batch"]:
        """KL(r(z) to r(z_new)), exact, keeping its digits when the two are close; batch axes."""
        self.check_outputs(z)
        self.check_outputs(z_new, "z_new")
        return self._kl(widen_tree(z), widen_tree(z_new)).astype(_dtype(z))

    def on_one_array(self, outputs: Callable[[], Any]) -> tuple[Head, OutputLayout | None]:
        """The head that the library computes with, and how outputs become the array it takes.

        Itself and None where ``outputs()``, those of the model, are one array already.
        """
        del outputs
        return self, None

    def batch_shape(self, z: ArrayOrShape) -> tuple[int, ...]:
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
            settable = "event_ndim" in getattr(self, "__dataclass_fields__", {})
            other = f", with targets y[:, None], or z with {kind}(event_ndim=0)" if settable else ""
            raise ValueError(
                f"{name}: {kind} expects at least one batch axis before its event axes"
                f" (event_ndim={self.event_ndim}), got shape {z.shape}. A model with one output per"
                f" example returns z[:, None]{other}; a single example is z[None]."
            )
        if 0 in z.shape:
            raise ValueError(
                f"{name}: expected a batch of at least one example and output, got {z.shape}."
            )
        self._check_event(z, name)

    def check_targets(self, z: ArrayOrShape, y: ArrayLike) -> Array:
        """Raises unless the targets ``y`` fit ``z``; returns them as an array."""
        self.check_outputs(z)
        y = jnp.asarray(y)
        self._check_targets(z, y)
        return y

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        """Raises when the event axes of ``z`` do not fit the head's own fields."""
        del z, name

    def _check_targets(self, z: ArrayOrShape, y: Array) -> None:
        if y.shape != z.shape:
            column = " y[:, None] has it." if (*y.shape, 1) == tuple(z.shape) else ""
            raise ValueError(
                f"targets: {type(self).__name__} expects one target for each output, shape"
                f" {z.shape} as z, got shape {y.shape}.{column}"
            )

    @abc.abstractmethod
    def _nll(self, z: Array, y: Array) -> Array: ...

    @abc.abstractmethod
    def _mean(self, z: Array) -> Array: ...

    @abc.abstractmethod
    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array: ...

    @abc.abstractmethod
    def _score(self, z: Array, y: Array) -> Array: ...

    @abc.abstractmethod
    def _fisher(self, z: Array, u: Array) -> Array: ...

    @abc.abstractmethod
    def _hessian(self, z: Array, y: Array, u: Array) -> Array: ...

    @abc.abstractmethod
    def _sqrt_fisher(self, z: Array, w: Array) -> Array: ...

    @abc.abstractmethod
    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array: ...

    @abc.abstractmethod
    def _kl(self, z: Array, z_new: Array) -> Array: ...

    def _relative_nll(self, z: Array, y: Array) -> Array:
        """See `relative_nll`; a head with normalising constants overrides it."""
        return self._nll(z, y)

    def _fisher_root(self, z: Array) -> Root:
        """See `fisher_root`; a head with fewer columns or a known score overrides it."""
        multiply = lambda w: self._sqrt_fisher(z, w)
        return Root(*unit_columns(multiply, z, self.event_ndim))

    def _hessian_root(self, z: Array, y: Array) -> Root | None:
        """See `hessian_root`; None, since a Hessian may be indefinite."""
        del z, y
        return None


class NaturalHead(Head):
    """A head whose ``z`` is the natural parameter: the Hessian of its nll is the Fisher F_R(z).

    The targets cancel: they enter the nll linearly, -y.z + A(z). A head whose targets may count
    more or less than once overrides ``_target_count``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_hessian" in vars(cls) and "_hessian_root" not in vars(cls):
            raise TypeError(
                f"{cls.__name__}: a NaturalHead states that its Hessian is the Fisher, but"
                " _hessian is defined; derive from fvp.Head, or define _hessian_root as well."
            )

    def _target_count(self, z: Array, y: Array) -> Array | None:
        """How often the targets of each example count, over the batch axes; None is once."""
        del z, y
        return None

    def _hessian(self, z: Array, y: Array, u: Array) -> Array:
        product, count = self._fisher(z, u), self._target_count(z, y)
        if count is None:
            return product
        return product * count.reshape(count.shape + (1,) * self.event_ndim)

    def _hessian_root(self, z: Array, y: Array) -> Root | None:
        root = self._fisher_root(z)
        if self._target_count(z, y) is None:
            return root
        return root.scaled(lambda: self._target_count(z, y), self.event_ndim)  # pyright: ignore


def _dtype(z: Any) -> Any:
    """The dtype of the array ``z``, or of what its arrays promote to."""
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(z)))


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
    return jnp.log1p(jnp.sum(probabilities * exp_excess(d), axis=axes))


def exp_excess(d: Array) -> Array:
    """The value of exp(d) - 1 - d, with its digits at small ``d``."""
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return jnp.where(jnp.abs(d) < 0.01, series, jnp.expm1(d) - d)
