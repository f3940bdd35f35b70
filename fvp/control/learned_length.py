"""A step length that is learned from the next batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from fvp.scalars import Scalars

# docs/decisions/steps.md
_FIRST, _SLOWER, _LAST = 2.0, 4.0, 0.01  # rate max(1 / (2 + slopes / 4), 0.01)
_MEMORY, _SMALL = 0.9, 0.1
_LASTING, _UPHILL = 1 - 1 / 30, -0.5
_LONGER = 1.0
_LARGEST = 2.0**63  # so that sums of steps stay finite where others never let them be taken


class LearnedLength(Scalars):
    """The length of the next step.

    The slope of the next batch along the steps just taken is an unbiased estimate of the true one
    where they ended, since that batch had no part in them. While it still points downhill steps are
    too short, and else too long: the logarithm of the length moves by the slope over its root mean
    square, times a rate r that falls from a half to a hundredth, for each gradient of a mean, over
    the first 392 slopes. So no units matter. No slope counts more than one root of that mean, so
    that no batch matters much, unless it moves the logarithm by less than a tenth: many batches
    that are fitted would outvote the rare one that is not.

    That is too soon for coordinates of little curvature, whose slopes are small against the noise
    of the steep ones and would last for many steps. So half of the movement is that of a second
    slope, in which every coordinate counts by its noise, however flat it is.

    Such slopes tell of directions that are as long as those before were. Once most batches are
    fitted, the one that is not has a direction that is ten times longer, so each is shortened to at
    most twice the root mean square of the last thirty: steps may grow, but by 5% each. The mean of
    n gradients, which varies less, to at most 1 + 1 / sqrt(n) times that.

    Reference:
      A. Gunes Baydin et al., Online learning rate adaptation with hypergradient descent, 2018; on
      the haste of one step: Y. Wu et al., Understanding short-horizon bias in stochastic
      meta-optimization, 2018.
    """

    length: Array  # 0 before the first step
    squares: Array  # decaying sum of the squared slopes
    squares_of_whitened: Array  # decaying sum
    weight: Array  # decaying count of them
    slopes: Array  # their number
    lasting: Array  # running average from 0 of slopes over their root mean squares, at most 1 each
    norms: Array  # running average from 0 of the squared norms of shortened directions
    directions: Array  # running average from 0 of one for each of them

    def learned(self, slope: Array, whitened: Array, gradients: Any = 1) -> LearnedLength:
        """After the slopes of a fresh gradient along the last steps: above zero is downhill.

        ``whitened`` is that of the gradient over its noise, coordinate by coordinate. The mean of
        several ``gradients`` tells as much as they would have one by one.
        """
        both = jnp.stack([slope, whitened]).astype(jnp.float32)
        powers = jnp.square(both)
        known = jnp.all(jnp.isfinite(powers)) & (both[0] != 0)
        rate = jnp.maximum(_LAST * gradients, 1 / (_FIRST + self.slopes / _SLOWER))
        most = jnp.maximum(1, _SMALL / rate)
        sums = _MEMORY * jnp.stack([self.squares, self.squares_of_whitened])
        sums += jnp.where(known, powers, 0)
        weight = _MEMORY * self.weight + known
        typical = jnp.sqrt(sums / jnp.where(weight > 0, weight, 1))
        relative = jnp.clip(both / jnp.where(typical > 0, typical, 1), -most, most)
        relative = jnp.where(known, jnp.mean(relative), 0)
        length = jnp.minimum(self.length * jnp.exp(rate * relative), _LARGEST)
        lasting = _LASTING * self.lasting + (1 - _LASTING) * jnp.clip(relative, -1, 1)
        return self._replace(
            length=length,
            squares=sums[0],
            squares_of_whitened=sums[1],
            weight=weight,
            slopes=self.slopes + known,
            lasting=lasting,
        )

    def shortened(self, square: Array, gradients: Any = 1) -> tuple[LearnedLength, Array]:
        """The next step's length, along a direction whose squared norm is ``square``.

        Also this after it; a direction of zeros leaves it as it is. The direction is that of the
        mean of ``gradients``.
        """
        longest = 1 + _LONGER / jnp.sqrt(jnp.float32(gradients))
        square = square.astype(jnp.float32)
        known = self.directions > 0
        typical = self.norms / jnp.where(known, self.directions, 1)
        shortened = jnp.where(known, jnp.minimum(square, longest**2 * typical), square)
        moves = shortened > 0
        average = lambda old, new: jnp.where(moves, _LASTING * old + (1 - _LASTING) * new, old)
        part = jnp.sqrt(shortened / jnp.where(moves, square, 1))
        after = self._replace(
            norms=average(self.norms, shortened), directions=average(self.directions, 1)
        )
        return after, jnp.where(moves, part, 1) * self.length

    @property
    def only_uphill(self) -> Array:
        """Whether steps have led uphill for long, whatever their length: it is their momentum."""
        return self.lasting < _UPHILL
