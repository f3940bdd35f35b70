"""Linear maps of pytrees as linear maps of vectors, in the order of ``ravel_pytree``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.checks import check_like
from fvp.numerics import cast_like, widen_tree, zeros_of
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Raveled:
    """A symmetric linear map of vectors of length ``size``, in float32 or wider.

    Attributes:
      operator: a callable v -> A v, or an object with ``mv``.
      like: what it multiplies, a tree of arrays or of their shapes and dtypes.
      unravel: a vector as a tree, in the widened dtypes.
      size: the number of entries.
      dtype: of the vectors.
    """

    operator: Any
    like: PyTree
    unravel: Callable[[Array], Any]
    size: int
    dtype: Any

    @classmethod
    def of(cls, operator: Any, like: PyTree = None) -> Self:
        """That of an ``operator`` that knows its ``like``, or of any callable and one.

        Raises:
          TypeError: where there is nothing to call, or ``like`` is missing.
          ValueError: where the trees hold no numbers.
        """
        if not (callable(operator) or hasattr(operator, "mv")):
            raise TypeError(
                f"operator: expected an operator or a callable v -> A v, got {operator!r}."
            )
        like = getattr(operator, "like", None) if like is None else like
        if like is None:
            raise TypeError(
                "like: expected a tree like what the operator multiplies, which a callable does"
                " not tell; pass like=params."
            )
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        flat, unravel = ravel_pytree(widen_tree(zeros_of(like)))
        if flat.size == 0:
            raise ValueError("like: expected at least one number, got a tree without any.")
        return cls(operator, like, unravel, flat.size, flat.dtype)

    def tree(self, v: Array) -> Params:
        """The vector ``v`` as a tree in the dtypes of ``like``."""
        return cast_like(self.unravel(v.astype(self.dtype)), self.like)

    def mv(self, v: Array) -> Array:
        """A v."""
        product = getattr(self.operator, "mv", self.operator)(self.tree(v))
        product = check_like(product, self.like, "operator(v)", "like", cast=False)
        return ravel_pytree(widen_tree(product))[0].astype(self.dtype)
