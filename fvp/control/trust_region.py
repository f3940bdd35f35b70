"""Trust region in KL divergence: how long a step may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_CORRECTIONS, _HALVINGS = 12, 60  # docs/decisions/steps.md
SLACK = 1.05  # of the bound; docs/decisions/steps.md


def length_within_kl(
    predicted: Array, max_kl: Any, exact: Callable[[Array], Array] | None, *, constant: bool
) -> Array:
    """The multiple a of a step whose divergence is at most ``max_kl``, or exactly that.

    With the prediction a^2 * predicted, predicted = 1/2 s^T F s, it is sqrt(max_kl / predicted).
    Where the exact divergence can be evaluated, a is corrected by the square root of their quotient
    until the two agree to 5%, and halved while the divergence is more than that above the bound,
    to 2^-60: where a confident model is wrong, 1/2 s^T F s may be far too small.

    Args:
      predicted: scalar, 1/2 s^T F s.
      max_kl: bound in nats for each example (mean), a positive number.
      exact: ``exact(a)``, the mean divergence of the step a s; one forward pass a call.
      constant: lengthen short steps as well.

    Returns:
      a; at most 1 unless ``constant``; 0 where no length is within the bound.

    Reference:
      S. Kakade, A natural policy gradient, 2001; J. Schulman et al., Trust region policy
      optimization, 2015, appendix C.
    """
    longest = jnp.inf if constant else 1.0
    tiny = jnp.finfo(predicted.dtype).tiny
    bound = jnp.asarray(max_kl, predicted.dtype)
    length = jnp.minimum(jnp.sqrt(bound / jnp.maximum(predicted, tiny)), longest)
    length = jnp.where(predicted > 0, length, 1)
    if exact is None:
        return length

    def divergence(a: Array) -> Array:
        return exact(a).astype(predicted.dtype)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        length, kl, trials = carry
        long, short = ~(kl <= 1.03 * bound), kl < 0.9 * bound
        lengthen = short & (length < longest) & (trials < _CORRECTIONS)
        return (length > 0) & ((long & (trials < _HALVINGS)) | lengthen)

    def shorten(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        length, kl, trials = carry
        change = jnp.sqrt(0.99 * bound / jnp.maximum(kl, tiny))
        # Far from the bound the quadratic law fails: go by halves there, or where kl is not finite.
        change = jnp.where(jnp.isfinite(change), jnp.clip(change, 0.5, 2), 0.5)
        length = jnp.minimum(change * length, longest)
        return length, divergence(length), trials + 1

    length, kl, _ = jax.lax.while_loop(
        unfinished, shorten, (length, divergence(length), jnp.zeros((), jnp.int32))
    )
    # A bound is a bound: where the correction has not settled, no step is taken.
    return jnp.where(kl <= SLACK * bound, length, 0)
