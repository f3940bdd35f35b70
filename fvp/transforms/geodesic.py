"""Geodesic acceleration: steps that bend with the model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import CurvatureOperator
from fvp.numerics import cast_like, tree_is_finite, tree_norm

_LONGEST = 0.75  # of the correction against the direction; beyond it the expansion says nothing


def geodesic_correction(
    operator: CurvatureOperator,
    solve_outputs: Callable[[Array], Any],
    direction: Any,
    *,
    searched: bool,
) -> Any:
    """The c of the path params - (s d + s^2/2 c), along which J c takes back the bend of z.

    c = (F + Lambda)^-1 J^T H_L z'' with z'' the second derivative of the outputs along d, from one
    JVP of a JVP. Zeros where c is not finite, and unless the length s is ``searched`` by the loss,
    where it is longer than 3/4 of d.

    Reference:
      M. Transtrum, J. Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear
      least-squares minimization, 2012.
    """
    source = operator.source
    if source is None or not hasattr(operator.piece, "pull"):
        raise ValueError(
            'geodesic: expected curvature="fisher", "ggn" or "empirical" without chunk_size.'
        )
    model = lambda params: source.model_fn(params, source.batch)
    tangent = cast_like(direction, source.params)
    slope = lambda params: jax.jvp(model, (params,), (tangent,))[1]
    _, bend = jax.jvp(slope, (source.params,), (tangent,))
    correction = solve_outputs(bend)
    usable = tree_is_finite(correction)
    if not searched:
        usable &= tree_norm(correction) <= _LONGEST * tree_norm(direction)
    return jax.tree.map(lambda c, d: jnp.where(usable, c, 0).astype(d.dtype), correction, direction)
