"""The Fisher divergence of a score model: Hyvarinen's score matching."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_positive_int
from fvp.numerics import widen


def fisher_divergence(
    score_fn: Callable[[Array], Array],
    x: Array,
    key: Array | None = None,
    *,
    num_slices: int = 1,
) -> Array:
    r"""Mean of 1/2 |s(x)|^2 + div s(x): the Fisher divergence up to a constant of the data.

    For x from a density p it is 1/2 E|s(x) - grad log p(x)|^2 - 1/2 E|grad log p(x)|^2, so that it
    is least where s is the score of p, which it does not need to know. Without a ``key`` the
    divergence is exact, by D JVPs; with one it is E_v[v.(ds/dx) v] over random signs v, by
    ``num_slices`` JVPs (sliced score matching, the Hutchinson estimate): unbiased.

    Args:
      score_fn: s, row by row: maps (N, D) to (N, D). Differentiate through what it closes over.
      x: (N, D) samples, floating-point.
      key: a ``jax.random`` key, for the sliced divergence; None for the exact one.
      num_slices: directions v for each row, with a ``key``.

    Returns:
      A scalar in float32 or wider.

    Raises:
      ValueError: if ``x`` is not (N, D), or s(x) has another shape.
      TypeError: if ``x`` is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, -1.0], [2.0, 0.0]])
      >>> print(fvp.fisher_divergence(lambda x: -x, x))  # mean of |x|^2 / 2 - D
      -0.5

    Reference:
      A. Hyvarinen, Estimation of non-normalized statistical models by score matching, 2005;
      Y. Song et al., Sliced score matching, 2019.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected floating-point samples, got dtype {x.dtype}.")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x: expected samples of shape (N, D), got {x.shape}.")
    check_positive_int(num_slices, "num_slices")
    score, jvp = jax.linearize(score_fn, x)
    if jnp.shape(score) != x.shape:
        raise ValueError(
            f"score_fn: expected one score for each sample, shape {x.shape}, got"
            f" {jnp.shape(score)}."
        )
    if key is None:
        directions = jnp.eye(x.shape[1], dtype=x.dtype)[:, None]
    else:
        directions = jax.random.rademacher(key, (num_slices, *x.shape), x.dtype)

    def slice_of(v: Array) -> Array:
        v = jnp.broadcast_to(v, x.shape)
        return jnp.sum(widen(v) * widen(jvp(v)))

    divergences = jax.lax.map(slice_of, directions)
    divergence = jnp.sum(divergences) if key is None else jnp.mean(divergences)
    return (0.5 * jnp.sum(widen(score) ** 2) + divergence) / x.shape[0]
