"""What the conjugate gradients of the transformations are preconditioned by."""

from __future__ import annotations

import abc

from jax.typing import ArrayLike

from fvp.curvature import CurvatureOperator
from fvp.typing import Params, PyTree


class Preconditioner(abc.ABC):
    """Approximates (F + damping I)^-1, anew every few steps: the base of your own.

    A frozen dataclass of options, passed as ``solver=fvp.CG(preconditioner=...)``. What it makes of
    one curvature is kept between steps, a pytree of arrays of fixed shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> class ByTrace(fvp.Preconditioner):
      ...     "Division by the mean eigenvalue, from one random quadratic form."
      ...     def init(self, params):
      ...         return jnp.ones(())
      ...     def update(self, made, operator, damping):
      ...         signs = jax.tree.map(jnp.ones_like, operator.like)
      ...         size = sum(p.size for p in jax.tree.leaves(signs))
      ...         return operator.quadratic_form(signs) / size + damping
      ...     def apply(self, made, v):
      ...         return jax.tree.map(lambda x: x / made, v)
      >>> solver = fvp.CG(preconditioner=ByTrace(), refresh_period=5)
    """

    @abc.abstractmethod
    def init(self, params: Params) -> PyTree:
        """Before the first curvature: zeros or ones of the shapes that `update` returns."""

    @abc.abstractmethod
    def update(self, made: PyTree, operator: CurvatureOperator, damping: ArrayLike) -> PyTree:
        """What is made of a new curvature, from what was ``made`` last.

        ``damping`` includes that of the l2 term. What is not finite is not kept.
        """

    @abc.abstractmethod
    def apply(self, made: PyTree, v: Params) -> Params:
        """The approximate inverse times ``v``: symmetric and positive definite."""
