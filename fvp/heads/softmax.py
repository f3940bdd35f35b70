"""The categorical distribution over logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.head import NaturalHead, log_partition_gap
from fvp.heads.root import Root
from fvp.numerics import divide_above_rounding, wide_dtype
from fvp.typing import ArrayOrShape


@dataclasses.dataclass(frozen=True)
class Softmax(NaturalHead):
    """Categorical distribution; ``z`` are logits of shape (batch axes, C), ``y`` labels.

    With p = softmax(z): F_R u = p (u - p.u), and S w = sqrt(p) w - p (sqrt(p).w). Every entry keeps
    its digits where p is near one class. A logit of -inf takes its class out.

    Targets are integers of shape (batch axes), or rows of the shape of ``z``. A label outside
    0 ... C - 1 gives NaN in ``nll``, ``score`` and ``hessian``; in a row of weight zero it does no
    harm. Rows are probabilities, or any weights of the classes, with nll = -sum_c y_c log p_c: the
    score is y - (sum y) p and the Hessian (sum y) F_R, which is F_R where the row sums to one.
    ``fisher`` is F_R whatever the targets.

    Label smoothing by a is rows of targets, ``(1 - a) * jax.nn.one_hot(y, C) + a / C``: they sum to
    one, so that every curvature but those of the data's own scores stays what it is. Weights of
    classes c are weights of examples, ``weights=c[y]``; the loss is then a mean over sum_i c[y_i].

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> z = jnp.zeros((2, 4))
      >>> print(fvp.Softmax().score(z, jnp.array([0, 3])))
      [[ 0.75 -0.25 -0.25 -0.25]
       [-0.25 -0.25 -0.25  0.75]]
    """

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        if z.shape[-1] < 2:
            raise ValueError(
                f"{name}: Softmax expects two classes or more on the last axis, got shape"
                f" {z.shape}; for one logit per example use Sigmoid."
            )

    def _check_targets(self, z: ArrayOrShape, y: Array) -> None:
        if jnp.issubdtype(y.dtype, jnp.floating):
            if y.shape != z.shape:
                raise ValueError(
                    "targets: Softmax expects probability rows of the shape of z, got"
                    f" {y.shape} for z of shape {z.shape}; class labels must be integers."
                )
        elif not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(
                f"targets: Softmax expects integer labels or probability rows, got {y.dtype};"
                " labels that are not floating-point are cast by y.astype(int)."
            )
        elif y.shape != self.batch_shape(z):
            raise ValueError(
                f"targets: Softmax expects integer labels of shape {self.batch_shape(z)} for z of"
                f" shape {z.shape}, got {y.shape}."
            )

    def _nll(self, z: Array, y: Array) -> Array:
        log_p = _log_softmax(z)
        if jnp.issubdtype(y.dtype, jnp.integer):
            y, valid = _labels(y, z.shape[-1])
            chosen = jnp.take_along_axis(log_p, jnp.where(valid, y, 0)[..., None], axis=-1)
            return jnp.where(valid, -chosen[..., 0], jnp.nan)
        # A class that the row leaves out contributes nothing, even where its logit is -inf.
        absent = (y == 0) & (log_p == -jnp.inf)
        return -jnp.sum(y.astype(z.dtype) * jnp.where(absent, 0, log_p), axis=-1)

    def _mean(self, z: Array) -> Array:
        return jax.nn.softmax(z)

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Array:
        del dtype
        return jax.random.categorical(key, z)

    def _score(self, z: Array, y: Array) -> Array:
        p = jax.nn.softmax(z)
        leading = _leading(p)
        others = _sum(jnp.where(leading, 0, p))  # 1 - p there, with its digits
        if not jnp.issubdtype(y.dtype, jnp.integer):
            y = y.astype(z.dtype)
            rest = _sum(jnp.where(leading, 0, y))
            return jnp.where(leading, y * others - p * rest, y - _sum(y) * p)
        y, valid = _labels(y, z.shape[-1])
        hit = y[..., None] == jnp.arange(z.shape[-1], dtype=y.dtype)
        score = jnp.where(hit, jnp.where(leading, others, 1 - p), -p)
        return jnp.where(valid[..., None], score, jnp.nan)

    def _fisher(self, z: Array, u: Array) -> Array:
        p = jax.nn.softmax(z)
        return p * _deviation(p, u)

    def _target_count(self, z: Array, y: Array) -> Array:
        """The sum of each row of targets; 1 for a label, NaN for one out of range."""
        if jnp.issubdtype(y.dtype, jnp.integer):
            return jnp.where(_labels(y, z.shape[-1])[1], 1, jnp.nan).astype(wide_dtype(z.dtype))
        return jnp.sum(y.astype(wide_dtype(z.dtype)), axis=-1)

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        p = jax.nn.softmax(z)
        leading, root = _leading(p), jnp.sqrt(p)
        others = _sum(jnp.where(leading, 0, p))
        along = root * w
        rest = _sum(jnp.where(leading, 0, along))
        # w - root (root.w), where the leading class's own share (1 - p) w would cancel.
        part = jnp.where(leading, others * w - root * rest, w - root * _sum(along))
        return root * part

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        p = jax.nn.softmax(z)
        return jnp.sqrt(p) * _deviation(p, u)

    def _fisher_root(self, z: Array) -> Root:
        """The columns of S H with the reflection H that takes the last unit vector to -sqrt(p).

        S sqrt(p) = 0, so that the last of them is zero: there are C - 1.
        """
        classes = z.shape[-1]

        def column(k: ArrayLike) -> Array:
            unit = (jnp.arange(classes) == k).astype(z.dtype)
            last = (jnp.arange(classes) == classes - 1).astype(z.dtype)
            w = jnp.broadcast_to(unit, z.shape)
            return self._sqrt_fisher(z, w - _sum(_reflection(z) * unit) * last)

        def score(targets: ArrayLike) -> Array:
            w = divide_above_rounding(-self.score(z, targets), jax.nn.softmax(z))
            along = _sum(jnp.sqrt(jax.nn.softmax(z)) * w) + w[..., -1:]
            return (w - _reflection(z) * along)[..., :-1]

        return Root(classes - 1, column, score)

    def _kl(self, z: Array, z_new: Array) -> Array:
        p = jax.nn.softmax(z)
        absent = p == 0
        log_ratio = jnp.where(absent, 0, _log_softmax(z) - _log_softmax(z_new))
        far = jnp.sum(p * log_ratio, axis=-1)
        # Close to each other the form above cancels; each form is evaluated on safe values only.
        excluded = (z == -jnp.inf) & (z_new == -jnp.inf)  # classes masked out of both
        d = jnp.where(excluded, 0, z_new - z)
        comparable = jnp.all(jnp.isfinite(d), axis=-1)
        d = jnp.where(excluded, 0, _deviation(p, jnp.where(comparable[..., None], d, 0)))
        near = comparable & (jnp.max(jnp.abs(d), axis=-1) < 1)
        close = log_partition_gap(p, jnp.where(near[..., None], d, 0), (-1,))
        return jnp.where(near, close, far)


def _labels(y: Array, classes: int) -> tuple[Array, Array]:
    """Labels in a dtype that holds all classes, and which of them are classes."""
    if jnp.iinfo(y.dtype).bits < 32:
        y = y.astype(jnp.int32)
    return y, (y >= 0) & (y < classes)


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _reflection(z: Array) -> Array:
    """v_k / v_C for k < C, where v = sqrt(p) + e_C and H = I - v v^T / v_C."""
    root = jnp.sqrt(jax.nn.softmax(z))
    return root / (1 + root[..., -1:])


def _leading(p: Array) -> Array:
    """The class that has three quarters and more, if there is one: 1 - p cancels there."""
    return p > 0.75  # never two, however p was rounded


def _deviation(p: Array, u: Array) -> Array:
    """The entries of u - p.u, counted from the leading class, where both nearly agree."""
    leading = _leading(p)
    d = jnp.where(leading, 0, u - _sum(jnp.where(leading, u, 0)))
    return d - _sum(p * d)


@jax.custom_jvp
def _log_softmax(z: Array) -> Array:
    """The log-probabilities; the largest is -log1p of what the others add, with its digits."""
    shifted = z - jnp.max(z, axis=-1, keepdims=True)
    top = shifted == 0
    others = _sum(jnp.where(top, 0, jnp.exp(shifted))) + (_sum(top.astype(z.dtype)) - 1)
    return shifted - jnp.log1p(others)


@_log_softmax.defjvp
def _log_softmax_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (z,), (tangent,) = primals, tangents
    return _log_softmax(z), _deviation(jax.nn.softmax(z), tangent)
