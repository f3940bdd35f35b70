"""A step length that is learned from the next batch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# docs/decisions/steps.md
_FIRST, _SLOWER, _LAST = 2.0, 4.0, 0.05  # rate max(1 / (2 + slopes / 4), 0.05)
_LARGEST, _MEMORY = 2.0, 0.9
_PATIENCE = 1 / 3


class LearnedLength(NamedTuple):
    """The multiple of a direction that is taken; all float32 scalars.

    The slope of the next batch along the step just taken is an unbiased estimate of the true one
    where the step ended, since that batch had no part in it. While it still points downhill steps
    are too short, and else too long: the logarithm of the length moves by the slope over its root
    mean square, times a rate that falls from a half to a twentieth over the first 72 steps. Where
    the slopes average to zero it rests: there the expected loss falls the most, in one step.

    That is too soon for coordinates of little curvature, whose slopes are small against the noise
    of the steep ones and would last for many steps. So a third of the movement is that of a second
    slope, in which every coordinate counts by its direction over its noise, however flat it is.

    Slopes enter by their relation to each other alone, so that no units matter, and by at most two
    of their root mean squares, so that no batch matters much.

    Reference:
      A. Gunes Baydin et al., Online learning rate adaptation with hypergradient descent, 2018; on
      the haste of one step: Y. Wu et al., Understanding short-horizon bias in stochastic
      meta-optimization, 2018.
    """

    length: Array  # 0 before the first step
    squares_of_slopes: Array  # decaying sum
    squares_of_whitened: Array  # decaying sum
    weight_of_squares: Array  # decaying count
    slopes: Array  # their number

    @classmethod
    def unknown(cls) -> LearnedLength:
        """Before the first step; one buffer for each field, so that it can be donated."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(5)))

    def learned(self, slope: Array, whitened: Array) -> LearnedLength:
        """After the slopes of a fresh gradient along the last direction: above zero is downhill.

        ``whitened`` is that of the gradient over its noise, coordinate by coordinate.
        """
        both = jnp.stack([slope, whitened]).astype(jnp.float32)
        powers = jnp.square(both)
        known = jnp.all(jnp.isfinite(powers)) & (both[0] != 0)
        sums = _MEMORY * jnp.stack([self.squares_of_slopes, self.squares_of_whitened])
        sums += jnp.where(known, powers, 0)
        weight = _MEMORY * self.weight_of_squares + known
        typical = jnp.sqrt(sums / jnp.where(weight > 0, weight, 1))
        relative = jnp.clip(both / jnp.where(typical > 0, typical, 1), -_LARGEST, _LARGEST)
        moved = (1 - _PATIENCE) * relative[0] + _PATIENCE * relative[1]
        rate = jnp.maximum(_LAST, 1 / (_FIRST + self.slopes / _SLOWER))
        change = jnp.exp(jnp.where(known, rate * moved, 0))
        length = jnp.minimum(self.length * change, jnp.finfo(jnp.float32).max)
        return LearnedLength(length, sums[0], sums[1], weight, self.slopes + known)
