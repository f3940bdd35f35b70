"""Elastic weight consolidation: a quadratic penalty in the metric of an old task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_like
from fvp.numerics import widen
from fvp.typing import Params


def ewc_penalty(
    params: Params, anchor: Params, importance: Params, strength: ArrayLike = 1.0
) -> Array:
    r"""The penalty 1/2 strength sum_p importance_p (params_p - anchor_p)^2.

    Added to the loss of a new task it keeps the parameters that an old one needs: ``anchor`` are
    the parameters after it, and ``importance`` the diagonal of its Fisher there,
    ``fvp.fisher_diagonal(...)``, times its number of examples for the whole of its likelihood, or,
    beside the mean loss of a new task, times the ratio of their numbers. Expect to raise
    ``strength`` to some hundreds: the diagonal knows nothing of changes of many parameters at once.

    After several tasks one penalty stands for all: the anchor is where the last one ended, and the
    importance a running sum, ``decay * importance + fvp.fisher_diagonal(...)``.

    Args:
      params: pytree of floating-point arrays.
      anchor: a pytree like it.
      importance: likewise.
      strength: how much the old task counts.

    Returns:
      A scalar in float32 or wider.

    Raises:
      ValueError: for another structure or another shape.
      TypeError: for leaves that are not floating-point.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> penalty = fvp.ewc_penalty(jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.array([1.0, 3.0]))
      >>> print(penalty)  # (1 + 3 * 4) / 2
      6.5

    Reference:
      J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017; on several
      tasks: A. Chaudhry et al., Riemannian walk for incremental learning, 2018 (arXiv 1801.10112).
    """
    params = check_inexact_tree(params, "params")
    anchor = check_like(anchor, params, "anchor", "params", cast=False)
    importance = check_like(importance, params, "importance", "params", cast=False)

    def term(x: Array, old: Array, weight: Array) -> Array:
        return jnp.sum(widen(weight) * (widen(x) - widen(old)) ** 2)

    terms = jax.tree.leaves(jax.tree.map(term, params, anchor, importance))
    return 0.5 * jnp.asarray(strength) * sum(terms, jnp.zeros((), jnp.float32))
