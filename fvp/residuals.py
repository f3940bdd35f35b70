"""Residuals of several kinds as the outputs of one model."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def stack_residuals(
    residuals: Mapping[str, ArrayLike], weights: Mapping[str, ArrayLike] | None = None
) -> Array:
    r"""Residuals of several kinds, scaled so that one mean is the loss of them all.

    With ``head=fvp.Gaussian(event_ndim=0)`` and targets of zeros, the mean loss of the result is

        sum_k weight_k mean_i 1/2 |r_k(x_i)|^2

    up to a constant, with the mean over the points of each kind: each residual is multiplied by
    sqrt(weight_k R / n_k), where n_k is the number of points of its kind and R that of all rows of
    the result. Call it at the end of a ``model_fn``; the solution of a differential equation is
    then a least-squares problem of few lines (``examples/poisson_pinn.py``).

    Args:
      residuals: by the name of their kind, arrays of shape (points) or (points, ...), a residual
        for each component of a system of equations; at least one kind.
      weights: of the mean of each kind, scalars of 0 or more; 1 for those that are not named.

    Returns:
      Array of shape (R,), one kind behind the other in the order of ``residuals``.

    Raises:
      ValueError: where there is no residual, for a kind without points or without a point axis,
        and for a weight of a kind that is not there.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> def model_fn(w, batch):  # w_0 + w_1 x with slope 3 inside, and 1 at the edge
      ...     u = lambda x: w[0] + w[1] * x
      ...     slope = jax.vmap(jax.grad(u))(batch["inside"])
      ...     kinds = {"slope": slope - 3, "edge": u(batch["edge"]) - 1}
      ...     return fvp.stack_residuals(kinds, weights={"edge": 10.0})
      >>> batch, w = {"inside": jnp.linspace(0, 1, 5), "edge": jnp.zeros(1)}, jnp.zeros(2)
      >>> F = fvp.fisher(model_fn, fvp.Gaussian(event_ndim=0), w, batch)
      >>> print(F.dense().round(3))  # 10 for the edge, 1 for the slope
      [[10.  0.]
       [ 0.  1.]]
      >>> zeros = jnp.zeros(6)
      >>> _, gradient = F.value_and_grad(zeros)
      >>> w -= fvp.solve_dual(F, gradient, 1e-6, targets=zeros)
      >>> print(*(f"{w_i:.3f}" for w_i in w))
      1.000 3.000
    """
    weights = {} if weights is None else weights
    if unknown := sorted(set(weights) - set(residuals)):
        raise ValueError(
            f"weights: expected those of {sorted(residuals)}, got {unknown}, of no residual."
        )
    kinds = {name: jnp.asarray(r) for name, r in residuals.items()}
    if not kinds:
        raise ValueError("residuals: expected at least one kind, got none.")
    for name, r in kinds.items():
        if r.ndim == 0 or r.size == 0:
            raise ValueError(
                f"residuals: expected an array of shape (points, ...) with one point or more for"
                f" {name!r}, got shape {r.shape}."
            )
    rows = sum(r.size for r in kinds.values())

    def scaled(name: str, r: Array) -> Array:
        weight = jnp.asarray(weights.get(name, 1.0), r.dtype)
        return (jnp.sqrt(weight * (rows / len(r))) * r).reshape(-1)

    return jnp.concatenate([scaled(name, r) for name, r in kinds.items()])
