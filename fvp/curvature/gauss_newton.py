"""Every curvature of the form J^T H J: one JVP, the z-space step, one VJP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import jax.numpy as jnp
from jax import Array

from fvp.curvature.linearization import Linearization
from fvp.curvature.linearized import Linearize, LinearizedCurvature
from fvp.curvature.output_curvature import OutputCurvature
from fvp.curvature.problem import Problem, apply_weights, mask_outputs
from fvp.heads import Head, Root
from fvp.numerics import pairwise, widen
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class GaussNewton(LinearizedCurvature):
    """sum_i w_i J_i^T H_i J_i, with the Jacobian J_i of z_i and the output curvature H_i."""

    model: Linearization
    curvature: OutputCurvature
    weights: Array | None
    head: Head

    @classmethod
    def of(cls, kind: type[OutputCurvature], problem: Problem) -> Self:
        """Linearises the model once and fixes the output curvature at its z."""
        model = Linearization.of(problem.outputs, problem.params)
        weights = problem.example_weights(model.output)
        z = mask_outputs(weights, problem.head.event_ndim, model.output)
        return cls(model, kind.at(problem, z), weights, problem.head)

    def product(self, v: Params, scale: Array) -> Params:
        """sum_i w_i J_i^T H_i J_i v."""
        return self.product_and_form(v, scale)[0]

    def product_and_form(self, v: Params, scale: Array) -> tuple[Params, Array]:
        """The product, and its inner product with ``v``, taken in the space of the outputs."""
        Jv = self.model.jvp(v)
        HJv = self.curvature(widen(Jv))
        product = self.model.vjp((scale * self._weighted(HJv)).astype(Jv.dtype))
        return product, scale * jnp.sum(self._weighted(widen(Jv) * HJv))

    def transpose_product(self, u: Array, scale: Array) -> Params:
        """sum_i w_i J_i^T H_i u_i for a change ``u`` of the outputs."""
        Hu = self.curvature(widen(u))
        return self.model.vjp((scale * self._weighted(Hu)).astype(u.dtype))

    def inner_products(self, vectors: Sequence[Params], scale: Array) -> Array:
        """sum_i w_i (J_i v)^T H_i (J_i v') for all pairs, from one JVP each."""
        images = [widen(self.model.jvp(v)) for v in vectors]
        inner = lambda u, Hu: scale * jnp.sum(self._weighted(u * Hu))
        return pairwise(inner, images, [self.curvature(u) for u in images])

    def value_and_gradient(self, targets: PyTree, scale: Array) -> tuple[Array, Params]:
        """sum_i w_i nll_i and its gradient."""
        value, cotangent = nll_and_cotangent(self.head, self.output, targets, self.weights)
        return scale * value, self.model.vjp((scale * cotangent).astype(self.output.dtype))

    def gradient_after(self, v: Params, targets: PyTree, scale: Array) -> Params:
        """sum_i w_i J_i^T (dnll_i/dz + H_i J_i v), summed in the space of the outputs."""
        Jv = self.model.jvp(v)
        _, cotangent = nll_and_cotangent(self.head, self.output, targets, self.weights)
        cotangent = cotangent + self._weighted(self.curvature(widen(Jv)))
        return self.model.vjp((scale * cotangent).astype(Jv.dtype))

    @property
    def output(self) -> Array:
        """The model's output z."""
        return self.model.output

    @property
    def jacobian(self) -> Linearization:
        """J of the model."""
        return self.model

    def root(self) -> Root | None:
        """That of the output curvature, without the weights."""
        return self.curvature.root()

    def __str__(self) -> str:
        return str(self.curvature)

    def _weighted(self, x: Array) -> Array:
        return apply_weights(self.weights, self.head.event_ndim, x)


@functools.cache
def gauss_newton_of(kind: type[OutputCurvature]) -> Linearize:
    """Linearises problems; one object for each ``kind``, the key of what is compiled for it."""
    return functools.partial(GaussNewton.of, kind)


def nll_and_cotangent(
    head: Head, z: Array, targets: PyTree, weights: Array | None
) -> tuple[Array, Array]:
    """sum_i w_i nll_i and its gradient in z, both in float32 or wider."""
    value = weighted_nll(head, z, targets, weights)
    z = widen(mask_outputs(weights, head.event_ndim, z))
    return value, -apply_weights(weights, head.event_ndim, head.score(z, targets))


def weighted_nll(head: Head, z: Array, targets: PyTree, weights: Array | None) -> Array:
    """sum_i w_i nll_i."""
    z = widen(mask_outputs(weights, head.event_ndim, z))
    return jnp.sum(apply_weights(weights, 0, head.nll(z, targets)))
