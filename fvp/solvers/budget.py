"""How many CG iterations a step gets where the user has not said."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from fvp.scalars import Scalars

# docs/decisions/solvers.md
ITERATIONS = 11
_FEWEST, _MOST = 2, 10 * ITERATIONS
_GROWTH = 1.1  # of the limit, a step
_SLOW, _MEMORY = 0.8, 0.9


class Budget(Scalars):
    """A limit that follows progress.

    Eleven iterations do while steps lower the gradient's norm by a fifth or more on average: what
    CG leaves over, the next step takes up with a new curvature. Where progress is slower, the solve
    that ends at its limit is what holds it up, and the limit grows by a tenth each step, to ten
    times the first; it shrinks when progress is back. Where the noise of the batches leads, it
    shrinks to two: directions of less curvature are mostly noise, and better left out.
    """

    limit: Array  # iterations of the next solve, rounded
    gradient_norm: Array  # of the last gradient; 0 before the first
    ratio: Array  # running average from 0 of each norm over the one before, at most 1

    @classmethod
    def first(cls) -> Budget:
        """Before the first step."""
        return cls.zeros()._replace(limit=ITERATIONS)

    @property
    def iterations(self) -> Array:
        """The limit for CG, int32."""
        return jnp.round(self.limit).astype(jnp.int32)

    def observe(self, norm: Array) -> Budget:
        """Takes in the norm of a new gradient."""
        norm = norm.astype(jnp.float32)
        kept = norm / jnp.where(self.gradient_norm > 0, self.gradient_norm, jnp.inf)
        ratio = _MEMORY * self.ratio + (1 - _MEMORY) * jnp.minimum(kept, 1)
        return self._replace(gradient_norm=norm, ratio=ratio)

    def correct(self, *, short: Array, noisy: Array) -> Budget:
        """After a step. ``short``: it was good, and CG ended at its limit; ``noisy``: noise led."""
        slow = self.ratio > _SLOW
        wanted = jnp.where(slow & short, _MOST, jnp.where(slow, self.limit, ITERATIONS))
        wanted = jnp.where(noisy, _FEWEST, wanted)
        limit = jnp.clip(wanted, self.limit / _GROWTH, self.limit * _GROWTH)
        return self._replace(limit=limit)
