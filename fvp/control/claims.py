"""Whether the noise of the batches leads: what steps claim, held against the next batch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# Memory of the sums: ten steps; and the part of the claims whose loss is too much.
# docs/decisions/steps.md
_MEMORY, _HALF = 0.9, 0.5


class Claims(NamedTuple):
    """Reductions of the loss that steps made on their own batches, and what became of them.

    A step from batch t claims L_t(before) - L_t(after). The next batch sees the same parameters at
    L_{t+1}(after), and what that is above L_t(after) was fitted to batch t alone. With both summed
    over the last ten steps, claims minus refuted is how far the loss of fresh batches has fallen.
    Where all batches are one, the refuted part is zero to rounding. All float32 scalars.
    """

    reduction: Array  # of the last step, on its own batch
    loss: Array  # of that batch after it; NaN before the first
    claimed: Array  # decaying sum of the reductions
    refuted: Array  # decaying sum of what the next batch found above the losses after them
    rounding: Array  # decaying sum of what rounding may have to do with it

    @classmethod
    def none(cls) -> Claims:
        """Before the first step; one buffer for each field, so that it can be donated."""
        zero = lambda: jnp.zeros((), jnp.float32)
        return cls(zero(), jnp.full((), jnp.nan, jnp.float32), zero(), zero(), zero())

    def held_against(self, loss: Array, precision: float) -> Claims:
        """With the ``loss`` of the next batch at the same parameters, which has that precision.

        A loss that is not finite says nothing.
        """
        loss = loss.astype(jnp.float32)
        known = jnp.isfinite(loss) & jnp.isfinite(self.loss)
        rounding = 4 * precision * (jnp.abs(loss) + jnp.abs(self.loss))
        add = lambda total, x: jnp.where(known, _MEMORY * total + x, total)
        return self._replace(
            claimed=add(self.claimed, self.reduction),
            refuted=add(self.refuted, loss - self.loss),
            rounding=add(self.rounding, rounding),
        )

    def after(self, before: Array, reduction: Array) -> Claims:
        """With the claim of a new step, whose batch had the loss ``before`` it."""
        reduction = reduction.astype(jnp.float32)
        return self._replace(reduction=reduction, loss=before.astype(jnp.float32) - reduction)

    @property
    def noise_leads(self) -> Array:
        """Whether the loss of fresh batches fell by less than half of what steps claimed."""
        return self.refuted > _HALF * self.claimed + self.rounding
