"""Weighted means of what is computed on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fvp.numerics import cast_like, widen
from fvp.typing import Batch, PyTree


def mean_over_batches(
    function: Callable[[Batch], PyTree],
    batches: Iterable[Batch],
    *,
    weight: Callable[[Batch], ArrayLike] | None = None,
    progress: bool = False,
) -> Any:
    r"""sum_b w_b function(batch_b) / sum_b w_b, reading the batches once and holding one.

    For what is itself a mean over the examples of its batch, with w_b the sum of their weights, the
    result is that of one batch of all examples: losses and gradients, `fvp.fisher_diagonal`,
    and the factors of `fvp.kfac`. Not eigenvalue-corrected factors, since each batch has
    eigenbases of its own, nor those of a weight that is tied to its transpose. For products see
    `fvp.dataset_operator`.

    Args:
      function: batch -> a pytree of floating-point arrays.
      batches: any iterable of batches.
      weight: batch -> its weight, a number or scalar array; None is the number of its examples, the
        length of the first axis of its first leaf.
      progress: whether to show a bar, which needs the package tqdm.

    Returns:
      A pytree like those of ``function``; summed in float32 or wider. Zeros where no batch has any
      weight.

    Raises:
      ValueError: where there are no batches.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0], [2.0], [3.0]])
      >>> diagonal = lambda x: fvp.fisher_diagonal(
      ...     lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((1, 1)), x
      ... )
      >>> mean = fvp.mean_over_batches(diagonal, [x[:2], x[2:]])
      >>> print(f"{mean.item():.3f}")  # (1 + 4 + 9) / 3
      4.667
    """
    weight = _example_count if weight is None else weight
    pairs = ((function(batch), weight(batch)) for batch in shown(batches, progress))
    return weighted_mean(pairs)


def weighted_mean(pairs: Iterable[tuple[PyTree, ArrayLike]]) -> Any:
    """The mean of trees with their weights, from one pass."""
    like = total = None
    weights: Any = 0.0
    for tree, weight in pairs:
        add = lambda sum_, x, w=weight: sum_ + jnp.asarray(w, widen(x).dtype) * widen(x)
        like = tree if like is None else like
        total = jax.tree.map(jnp.zeros_like, jax.tree.map(widen, tree)) if total is None else total
        total = jax.tree.map(add, total, tree)
        weights = weights + jnp.asarray(weight)
    if like is None:
        raise ValueError("batches: expected at least one, got none.")
    divisor = jnp.where(weights == 0, 1, weights)
    return cast_like(jax.tree.map(lambda x: x / divisor.astype(x.dtype), total), like)


def shown(batches: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    """The batches, behind a bar where one is asked for."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: the bar is that of tqdm; pip install tqdm.") from error
    return tqdm(batches, "batches")


def _example_count(batch: Batch) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or jnp.ndim(leaves[0]) == 0:
        raise ValueError(
            "batches: expected the example axis first in the first leaf of a batch, to weight it by"
            " the number of its examples; pass weight=(batch -> its weight)."
        )
    return jnp.shape(leaves[0])[0]
