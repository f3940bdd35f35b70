"""Fields of heads that are positive numbers, or arrays of them over the event axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fvp.typing import ArrayOrShape


def check_positive(value: Any, name: str, what: str, event_ndim: int) -> None:
    """Raises unless ``value`` is positive and has no more axes than an event."""
    if jnp.ndim(value) > event_ndim:
        raise ValueError(
            f"{name}: expected a number or an array over the event axes (event_ndim={event_ndim}),"
            f" got shape {jnp.shape(value)}."
        )
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name}: expected {what}, got {value}.")


def check_fits_event(
    value: Any, field: str, kind: str, z: ArrayOrShape, event_ndim: int, name: str
) -> None:
    """Raises unless ``value`` broadcasts to the event axes of ``z``."""
    event = z.shape[z.ndim - event_ndim :]
    try:
        fits = np.broadcast_shapes(jnp.shape(value), event) == event
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: {kind}({field} of shape {jnp.shape(value)}) does not broadcast to the event"
            f" axes {event} of z of shape {z.shape}."
        )
