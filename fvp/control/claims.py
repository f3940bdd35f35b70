"""Whether the noise of the batches leads: what steps claim, held against the next batch."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from fvp.scalars import Scalars

# Memory of the sums: ten steps; and the part of the claims whose loss says that noise leads.
# docs/decisions/steps.md
MEMORY, _QUARTER = 0.9, 0.25


class Claims(Scalars):
    """Reductions of the loss that steps made on their own batches, and what became of them.

    A step from batch t claims L_t(before) - L_t(after). The next batch sees the same parameters at
    L_{t+1}(after), and what that is above L_t(after) was fitted to batch t alone. With both summed
    over the last ten steps, claims minus refuted is how far the loss of fresh batches has fallen.
    Where all batches are one, the refuted part is zero to rounding.
    """

    before: Array  # loss of the last batch, before its step
    slope: Array  # how far it would have fallen along the step without curvature
    reduction: Array  # how far it fell
    known: Array  # 1 where these are, else 0
    claimed: Array  # decaying sum of the reductions
    refuted: Array  # decaying sum of what the next batch found above the losses after them
    rounding: Array  # decaying sum of what rounding may have to do with it

    def held_against(self, loss: Array, part: Array, precision: float) -> Claims:
        """With the ``loss`` of the next batch, which has that precision.

        The ``part`` of the step that was taken is 1 but where another transformation has changed
        it; then the reduction is the parabola's through what is known. A loss that is not finite
        says nothing.
        """
        loss = loss.astype(jnp.float32)
        known = jnp.isfinite(loss) & (self.known > 0)
        shortened = part * self.slope - part**2 * (self.slope - self.reduction)
        reduction = jnp.where(part == 1, self.reduction, shortened)
        after = self.before - reduction
        add = lambda total, x: jnp.where(known, MEMORY * total + x, total)
        return self._replace(
            claimed=add(self.claimed, reduction),
            refuted=add(self.refuted, loss - after),
            rounding=add(self.rounding, 4 * precision * (jnp.abs(loss) + jnp.abs(self.before))),
        )

    def after(self, before: Array, slope: Array, reduction: Array) -> Claims:
        """With the claim of a new step."""
        values = [x.astype(jnp.float32) for x in (before, slope, reduction)]
        known = jnp.isfinite(jnp.stack(values)).all()
        before, slope, reduction = (jnp.where(known, x, 0) for x in values)
        return self._replace(before=before, slope=slope, reduction=reduction, known=known)

    @property
    def noise_leads(self) -> Array:
        """Whether fresh batches took back more than a quarter of what was claimed."""
        return self.refuted > _QUARTER * self.claimed + self.rounding

    @property
    def loss_has_risen(self) -> Array:
        """Whether fresh batches took back all that was claimed: their loss is above its average."""
        return self.refuted > self.claimed
