"""What an operator multiplies by: a curvature of the summed loss, linearised at some examples."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from jax import Array

from fvp.curvature.linearization import Linearization
from fvp.curvature.problem import Problem
from fvp.heads import Root
from fvp.records import Record
from fvp.typing import Params, PyTree


class LinearizedCurvature(Record, abc.ABC):
    """A curvature C of sum_i w_i nll_i over some examples, linearised once; a pytree.

    Gauss-Newton matrices, the exact Hessian and sums over chunks are of this kind; the operator
    (`fvp.CurvatureOperator`) divides by the total weight. Every method takes a power of two,
    ``scale``, that multiplies its result before anything is summed.
    """

    @property
    @abc.abstractmethod
    def output(self) -> Array:
        """The model's output z."""

    @abc.abstractmethod
    def product(self, v: Params, scale: Array) -> Params:
        """C v."""

    @abc.abstractmethod
    def product_and_form(self, v: Params, scale: Array) -> tuple[Params, Array]:
        """C v and v^T C v."""

    @abc.abstractmethod
    def inner_products(self, vectors: Sequence[Params], scale: Array) -> Array:
        """The matrix of v^T C v' for all pairs."""

    @abc.abstractmethod
    def value_and_gradient(self, targets: PyTree, scale: Array) -> tuple[Array, Params]:
        """sum_i w_i nll_i at ``targets``, and its gradient."""

    @property
    def jacobian(self) -> Linearization | None:
        """J where C = sum_i w_i J_i^T H_i J_i and J is kept; else None."""
        return None

    def root(self) -> Root | None:
        """The root of H where C is of that form and one is known; else None."""
        return None

    def transpose_product(self, u: Array, scale: Array) -> Params:
        """sum_i w_i J_i^T H_i u_i for a change ``u`` of the outputs, where C = J^T H J.

        Raises:
          TypeError: for other curvatures, and where J is not kept.
        """
        raise self._not_of_that_form()

    def gradient_after(self, v: Params, targets: PyTree, scale: Array) -> Params:
        """The gradient of sum_i w_i nll_i plus C v, where C = J^T H J: that of the quadratic model.

        Keeps its digits where the two cancel, at a ``v`` that solves for them.

        Raises:
          TypeError: as `transpose_product`.
        """
        raise self._not_of_that_form()

    def _not_of_that_form(self) -> TypeError:
        return TypeError(
            "operator: expected one of the form J^T H J, built without chunk_size, such as"
            f" fvp.fisher(...), got a {type(self).__name__}."
        )

    def __str__(self) -> str:
        return type(self).__name__


Linearize = Callable[[Problem], LinearizedCurvature]
