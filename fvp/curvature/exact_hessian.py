"""The exact Hessian of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature.gauss_newton import nll_and_cotangent, weighted_nll
from fvp.curvature.linearization import Linearization
from fvp.curvature.linearized import LinearizedCurvature
from fvp.curvature.problem import Problem
from fvp.heads import Head
from fvp.numerics import pairwise, tree_vdot, tree_zeros_like, widen
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class ExactHessian(LinearizedCurvature):
    """Hessian of sum_i w_i nll_i: the linearisation of params -> (z, gradient)."""

    model: Linearization
    weights: Array | None
    head: Head

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Linearises the gradient once, with the output beside it."""

        def output_and_gradient(params: Params) -> tuple[Array, Params]:
            def loss(params: Params) -> tuple[Array, Array]:
                z = problem.outputs(params)
                weights = problem.example_weights(z)
                return weighted_nll(problem.head, z, problem.targets, weights), z

            gradient, z = jax.grad(loss, has_aux=True)(params)
            return z, gradient

        model = Linearization.of(output_and_gradient, problem.params)
        return cls(model, problem.example_weights(model.output[0]), problem.head)

    @property
    def output(self) -> Array:
        """The model's output z."""
        return self.model.output[0]

    def product(self, v: Params, scale: Array) -> Params:
        """The Hessian is symmetric, so the VJP of the gradient is the product itself."""
        scaled = jax.tree.map(lambda x: (scale * widen(x)).astype(x.dtype), v)
        return self.model.vjp((jnp.zeros_like(self.output), scaled))

    def product_and_form(self, v: Params, scale: Array) -> tuple[Params, Array]:
        """The product, and its inner product with ``v``."""
        product = self.product(v, scale)
        return product, tree_vdot(v, product)

    def inner_products(self, vectors: Sequence[Params], scale: Array) -> Array:
        """v^T H v' for all pairs, from one product each."""
        return pairwise(tree_vdot, vectors, [self.product(v, scale) for v in vectors])

    def value_and_gradient(self, targets: PyTree, scale: Array) -> tuple[Array, Params]:
        """sum_i w_i nll_i and its gradient."""
        value, cotangent = nll_and_cotangent(self.head, self.output, targets, self.weights)
        cotangent = (scale * cotangent).astype(self.output.dtype)
        no_curvature = tree_zeros_like(self.model.output[1])
        return scale * value, self.model.vjp((cotangent, no_curvature))
