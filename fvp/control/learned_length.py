"""A step length that is learned from the next batch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# docs/decisions/steps.md
_FIRST, _SLOWER, _LAST = 2.0, 4.0, 0.05  # rate max(1 / (2 + slopes / 4), 0.05)
_LARGEST, _MEMORY = 2.0, 0.9


class LearnedLength(NamedTuple):
    """The multiple of a direction that is taken; all float32 scalars.

    The slope of the next batch along the step just taken is an unbiased estimate of the true one
    where the step ended, since that batch had no part in it. While it still points downhill steps
    are too short, and else too long: the logarithm of the length moves by the slope over its root
    mean square, times a rate that falls from a half to a twentieth over the first 72 steps. Where
    the slopes average to zero it rests: there the expected loss falls the most. Slopes enter by
    their relation to each other alone, so that no units matter, and by at most two of their root
    mean squares, so that no batch matters much.

    Reference:
      A. Gunes Baydin et al., Online learning rate adaptation with hypergradient descent, 2018.
    """

    length: Array  # 0 before the first step
    slope_squares: Array  # decaying sum of the squared slopes
    slope_weight: Array  # decaying count of them
    slopes: Array  # their number

    @classmethod
    def unknown(cls) -> LearnedLength:
        """Before the first step; one buffer for each field, so that it can be donated."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(4)))

    def learned(self, slope: Array) -> LearnedLength:
        """After the ``slope`` of a fresh gradient along the last step: above zero is downhill."""
        slope = slope.astype(jnp.float32)
        known = jnp.isfinite(slope) & (slope != 0) & jnp.isfinite(jnp.square(slope))
        squares = _MEMORY * self.slope_squares + jnp.where(known, jnp.square(slope), 0)
        seen = _MEMORY * self.slope_weight + known
        typical = jnp.sqrt(squares / jnp.where(seen > 0, seen, 1))
        relative = jnp.where(known, slope / jnp.where(typical > 0, typical, 1), 0)
        rate = jnp.maximum(_LAST, 1 / (_FIRST + self.slopes / _SLOWER))
        change = jnp.exp(rate * jnp.clip(relative, -_LARGEST, _LARGEST))
        value = jnp.clip(self.length * change, 0, jnp.finfo(jnp.float32).max)
        return LearnedLength(value, squares, seen, self.slopes + known)
