"""Outputs of several heads as one array, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class OutputLayout:
    """Where each named output is on the last axis of an array (batch axes, D); hashable.

    Attributes:
      names: in order.
      events: the event shape of each.
      dtypes: of each.
    """

    names: tuple[str, ...]
    events: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @property
    def size(self) -> int:
        """D, the entries of all events."""
        return sum(map(math.prod, self.events))

    def join(self, outputs: Any) -> Array:
        """One array of the named ``outputs``, in the dtype that they promote to.

        What is one array already stays it.
        """
        if not isinstance(outputs, Mapping):
            return outputs
        dtype = jnp.result_type(*self.dtypes)
        flat = []
        for name, event in zip(self.names, self.events, strict=True):
            z = jnp.asarray(outputs[name])
            flat.append(z.reshape(*z.shape[: z.ndim - len(event)], math.prod(event)).astype(dtype))
        return jnp.concatenate(flat, axis=-1)

    def split(self, z: Array, dtypes: tuple[DTypeLike, ...] | None = None) -> dict[str, Array]:
        """The named outputs of the array ``z``, in ``dtypes`` or in its own."""
        parts, start = {}, 0
        for i, (name, event) in enumerate(zip(self.names, self.events, strict=True)):
            stop = start + math.prod(event)
            part = z[..., start:stop].reshape(*z.shape[:-1], *event)
            parts[name] = part if dtypes is None else part.astype(dtypes[i])
            start = stop
        return parts
