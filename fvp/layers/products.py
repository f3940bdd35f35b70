"""Matrix products of the layer rules, at full precision on every device.

Products of factors and Gram matrices feed inverses: TF32 inputs would cost them most of their
digits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
