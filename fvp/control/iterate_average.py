"""Steps to the average of where a sequence of longer steps leads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fvp.numerics import computed_once, in_order, wide_dtype
from fvp.typing import Params

_AVERAGED = 0.9  # the rest of every step is taken at once; docs/decisions/steps.md


class IterateAverage(NamedTuple):
    """Schedule-free averaging, as a momentum with a memory that grows.

    A sequence z moves by length times direction; x is the average of its points, each weighted by
    its number and its length; and the parameters are y = .1 z + .9 x, where gradients are taken.
    Noise moves z, and averages out in x, so that lengths needn't fall for it to: in a convex
    problem x comes as near as the best fixed length would, without knowing when training ends.

    Only y - z is kept. Whatever others do to the parameters, such as weight decay or a learning
    rate behind this transformation, moves z and x alike.

    Reference:
      A. Defazio et al., The road less scheduled, 2024.
    """

    steps: Array  # float32 scalar, their number
    share: Array  # float32 scalar, of the newest point in the average; 0 before the first
    ahead: Params  # y - z: what is left to subtract of all directions so far; float32 or wider

    @classmethod
    def of(cls, params: Params) -> IterateAverage:
        """Before the first step."""
        zeros = lambda p: jnp.zeros_like(p, wide_dtype(p.dtype))
        zero = lambda: jnp.zeros((), jnp.float32)
        return cls(zero(), zero(), jax.tree.map(zeros, params))

    def stepped(
        self, direction: Params, rate: Array, longer: Array, anew: Array
    ) -> tuple[IterateAverage, Params]:
        """With one more direction, and the step that is to be subtracted; in its wide dtypes.

        Args:
          direction: to go against; like the parameters.
          rate: the length, scalar.
          longer: this length over the last one, for its weight.
          anew: bool, whether the average starts anew from the parameters.
        """
        steps = jnp.where(anew, 0, self.steps)
        # Weights w = number x length; share' = w' / (w' + all before), with share = w / all before.
        older = steps / ((steps + 1) * longer * jnp.where(self.share > 0, self.share, 1))
        share = 1 / (1 + older)
        kept, taken = 1 - share, jnp.where(anew, 0, share)
        now = (1 - _AVERAGED * kept) * rate
        later = _AVERAGED * kept * rate
        taken, kept, now, later = computed_once((taken, kept, now, later))
        step = jax.tree.map(lambda a, d: taken * a + now * d, self.ahead, direction)
        step, before = in_order(step, self.ahead)
        ahead = jax.tree.map(lambda a, d: kept * a + later * d, before, direction)
        return IterateAverage(steps + 1, share, ahead), step
