"""Columns of a matrix root in the space of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Root(NamedTuple):
    """Columns c_1 ... c_K with sum_k c_k c_k^T = H, for the (event x event) H of each example.

    Attributes:
      size: K, the number of columns.
      column: ``column(k)`` is column number k of all examples at once: batch axes + event axes, in
        float32 or wider. ``k`` may be a tracer.
      score: ``score(targets)`` gives the w (batch axes, K) with sum_k w_k c_k = -score(z, targets),
        the gradient of the nll; None where that has no closed form.
      independent: the columns of two examples are random, independent and of mean zero, so that
        their products vanish in expectation.
    """

    size: int
    column: Callable[[ArrayLike], Array]
    score: Callable[[ArrayLike], Array] | None = None
    independent: bool = False

    def scaled(self, factor: Callable[[], Array], event_ndim: int) -> Root:
        """The root of c H, for the c of each example (batch axes) that ``factor()`` gives."""
        score = self.score

        def column(k: ArrayLike) -> Array:
            scale = jnp.sqrt(factor())
            return scale.reshape(scale.shape + (1,) * event_ndim) * self.column(k)

        def scaled_score(targets: ArrayLike) -> Array:
            assert score is not None
            w, c = score(targets), factor()[..., None]
            # The score is c times that of F_R: sqrt(c) is in the columns, sqrt(c) left.
            return jnp.where(c > 0, w / jnp.sqrt(jnp.where(c > 0, c, 1)), 0)

        return Root(self.size, column, None if score is None else scaled_score)


def unit_columns(
    multiply: Callable[[Array], Array], z: Array, event_ndim: int
) -> tuple[int, Callable[[ArrayLike], Array]]:
    """The columns S e_k of ``multiply``, w -> S w, for the unit vectors of an event of ``z``."""
    event = z.shape[z.ndim - event_ndim :]
    size = math.prod(event)

    def column(k: ArrayLike) -> Array:
        unit = (jnp.arange(size) == k).astype(z.dtype).reshape(event)
        return multiply(jnp.broadcast_to(unit, z.shape))

    return size, column


def flat_events(w: Array, event_ndim: int) -> Array:
    """``w`` of shape (batch axes, event axes) as (batch axes, K)."""
    return w.reshape(*w.shape[: w.ndim - event_ndim], -1)
