"""A curvature of a data set, that multiplies batch by batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array

from fvp.curvature import CurvatureOperator
from fvp.datasets.mean import shown, weighted_mean
from fvp.typing import Batch, Params


def dataset_operator(
    build: Callable[[Batch], CurvatureOperator],
    batches: Iterable[Batch],
    *,
    progress: bool = False,
) -> DatasetOperator:
    r"""The curvature of all batches together: sum_b W_b F_b / sum_b W_b.

    W_b is the sum of the weights in batch b, so that the result is the operator of one batch of all
    examples. Nothing is kept but the recipe: every product reads the batches anew, linearises one
    after the other, and holds one.

    Call it outside ``jit``; inside, the loop is unrolled and the batches become part of the
    program. Solvers that loop in Python take it through ``fvp.interop.as_scipy``.

    Args:
      build: batch -> its operator, such as
        ``lambda batch: fvp.fisher(model_fn, head, params, batch)``. Programs are compiled for each
        ``model_fn`` once: make that outside of it.
      batches: an iterable that can be read again and again, such as a list or a data loader.
      progress: whether to show a bar for each product, which needs the package tqdm.

    Returns:
      A `DatasetOperator`: ``F @ v``, ``F.mv(v)``, ``F.quadratic_form(v)``.

    Raises:
      TypeError: for an iterator, which can be read once only.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> model, w = lambda w, x: x @ w, jnp.zeros((1, 1))
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0]])]
      >>> F = fvp.dataset_operator(lambda x: fvp.fisher(model, fvp.Gaussian(), w, x), batches)
      >>> print(f"{(F @ jnp.ones((1, 1))).item():.3f}")  # (1 + 4 + 9) / 3
      4.667
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches: expected an iterable that can be read again for every product, such as a list"
            f" or a data loader, got the iterator {batches!r}."
        )
    return DatasetOperator(build, batches, progress)


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetOperator:
    """A mean of operators over batches; built by `fvp.dataset_operator`. Not a pytree."""

    build: Callable[[Batch], CurvatureOperator]
    batches: Iterable[Batch]
    progress: bool = False

    @functools.cached_property
    def like(self) -> Any:
        """Shapes and dtypes of the parameters, as a tree of ``jax.ShapeDtypeStruct``."""
        for operator in self._operators(False):
            return operator.like
        raise ValueError("batches: expected at least one, got none.")

    def mv(self, v: Params) -> Params:
        """The curvature times ``v``, from one pass over the batches."""
        return self._mean(lambda operator: operator.mv(v))

    def __matmul__(self, v: Params) -> Params:
        return self.mv(v)

    def __call__(self, v: Params) -> Params:
        return self.mv(v)

    def mv_and_form(self, v: Params) -> tuple[Params, Array]:
        """The product with ``v`` and v^T (curvature) v, from one pass."""
        return self._mean(lambda operator: operator.mv_and_form(v))

    def quadratic_form(self, v: Params) -> Array:
        """v^T (curvature) v, a scalar in float32 or wider."""
        return self._mean(lambda operator: operator.quadratic_form(v))

    def _mean(self, function: Callable[[CurvatureOperator], Any]) -> Any:
        pairs = ((function(o), _weight(o)) for o in self._operators(self.progress))
        return weighted_mean(pairs)

    def _operators(self, progress: bool) -> Iterator[CurvatureOperator]:
        for batch in shown(self.batches, progress):
            operator = self.build(batch)
            if not isinstance(operator, CurvatureOperator):
                raise TypeError(
                    "build: expected a function batch -> operator, such as lambda x: fvp.fisher("
                    f"model_fn, head, params, x), got {operator!r} from it."
                )
            yield operator


def _weight(operator: CurvatureOperator) -> Array:
    """The sum of the weights; a batch without any has an infinite divisor."""
    return jnp.where(jnp.isinf(operator.total), 0, operator.total)
