"""Curvature of the weighted *sum* of the loss over some examples, linearised once.

The operator (operator.py) divides by the total weight; chunking (chunking.py) adds pieces up. Every
method takes a power of two, ``scale``, that multiplies its result before anything is summed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import broadcast_weights
from fvp.curvature.linearization import Linearization
from fvp.curvature.metrics import Examples
from fvp.heads import Head
from fvp.mesh import AxisName, device_count, sum_over
from fvp.numerics import pairwise, tree_vdot, tree_zeros_like, wide_dtype, widen


def example_weights(head: Head, z: Any, weights: Any) -> Array | None:
    """The weights over all batch axes of ``z``; raises where ``z`` does not fit the head."""
    head.check_outputs(z)
    if weights is None:
        return None
    return broadcast_weights(weights, head.batch_shape(z), wide_dtype(z.dtype))


def total_weight(
    weights: Array | None, z: Any, batch_shape: tuple[int, ...], axis_name: AxisName
) -> Array:
    """sum_i w_i; infinite where that is zero, so that dividing by it gives the promised zero."""
    if weights is None:
        count = math.prod(batch_shape) * device_count(axis_name)
        return jnp.asarray(count, wide_dtype(z.dtype))
    total = sum_over(jnp.sum(weights), axis_name)
    return jnp.where(total == 0, jnp.inf, total)


def apply_weights(weights: Array | None, event_ndim: int, x: Array) -> Array:
    """w_i x_i over the event axes of ``x``; exactly zero at zero weight, whatever x_i is there."""
    if weights is None:
        return x
    w = weights.reshape(weights.shape + (1,) * event_ndim)
    return jnp.where(w == 0, 0, w * x)


def mask_outputs(weights: Array | None, event_ndim: int, z: Array) -> Array:
    """``z`` with rows of zero weight replaced by zeros, so that nothing non-finite starts there."""
    if weights is None:
        return z
    w = weights.reshape(weights.shape + (1,) * event_ndim)
    return jnp.where(w == 0, 0, z)


def weighted_nll(head: Head, z: Array, targets: Any, weights: Array | None) -> Array:
    """sum_i w_i nll_i."""
    z = widen(mask_outputs(weights, head.event_ndim, z))
    return jnp.sum(apply_weights(weights, 0, head.nll(z, targets)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussNewtonPiece:
    """sum_i w_i J_i^T H_i J_i: every curvature of the form JVP -> z-space scaling -> VJP."""

    linearization: Linearization
    metric: Any
    weights: Array | None
    head: Head

    @property
    def output(self) -> Array:
        """The model's output z."""
        return self.linearization.output

    def product(self, v: Any, scale: Array) -> Any:
        """sum_i w_i J_i^T H_i J_i v."""
        return self.pull(self.linearization.jvp(v), scale)

    def product_and_form(self, v: Any, scale: Array) -> tuple[Any, Array]:
        """The product, and its inner product with ``v``, taken in the space of the outputs."""
        u = self.linearization.jvp(v)
        scaled = self.metric(widen(u))
        return self._pull_scaled(scaled, u.dtype, scale), self._inner(widen(u), scaled, scale)

    def pull(self, u: Array, scale: Array) -> Any:
        """sum_i w_i J_i^T H_i u_i for a change ``u`` of the outputs."""
        return self._pull_scaled(self.metric(widen(u)), u.dtype, scale)

    def inner_products(self, vectors: Sequence[Any], scale: Array) -> Array:
        """sum_i w_i (J_i v)^T H_i (J_i v') for all pairs, from one JVP each."""
        images = [widen(self.linearization.jvp(v)) for v in vectors]
        product = lambda u, scaled: self._inner(u, scaled, scale)
        return pairwise(product, images, [self.metric(u) for u in images])

    def _pull_scaled(self, scaled: Array, dtype: Any, scale: Array) -> Any:
        """sum_i w_i J_i^T h_i, for h = ``scaled`` what H_i made of outputs of that dtype."""
        weighted = apply_weights(self.weights, self.head.event_ndim, scaled)
        return self.linearization.vjp((scale * weighted).astype(dtype))

    def _inner(self, u: Array, scaled: Array, scale: Array) -> Array:
        """sum_i w_i u_i . h_i."""
        return scale * jnp.sum(apply_weights(self.weights, self.head.event_ndim, u * scaled))

    def value_and_gradient(self, targets: Any, scale: Array) -> tuple[Array, Any]:
        """sum_i w_i nll_i and its gradient."""
        value, cotangent = _value_and_cotangent(self, targets, scale)
        return value, self.linearization.vjp(cotangent)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianPiece:
    """Hessian of sum_i w_i nll_i: the linearisation of params -> (z, gradient)."""

    linearization: Linearization
    weights: Array | None
    head: Head

    @property
    def output(self) -> Array:
        """The model's output z."""
        return self.linearization.output[0]

    def product(self, v: Any, scale: Array) -> Any:
        """The Hessian is symmetric, so the VJP of the gradient is the product itself."""
        scaled = jax.tree.map(lambda x: (scale * widen(x)).astype(x.dtype), v)
        return self.linearization.vjp((jnp.zeros_like(self.output), scaled))

    def product_and_form(self, v: Any, scale: Array) -> tuple[Any, Array]:
        """The product, and its inner product with ``v``."""
        product = self.product(v, scale)
        return product, tree_vdot(v, product)

    def inner_products(self, vectors: Sequence[Any], scale: Array) -> Array:
        """v^T H v' for all pairs, from one product each."""
        return pairwise(tree_vdot, vectors, [self.product(v, scale) for v in vectors])

    def value_and_gradient(self, targets: Any, scale: Array) -> tuple[Array, Any]:
        """sum_i w_i nll_i and its gradient."""
        value, cotangent = _value_and_cotangent(self, targets, scale)
        no_curvature = tree_zeros_like(self.linearization.output[1])
        return value, self.linearization.vjp((cotangent, no_curvature))


def _value_and_cotangent(piece: Any, targets: Any, scale: Array) -> tuple[Array, Array]:
    """sum_i w_i nll_i and its gradient in z, both times ``scale``."""
    z = widen(mask_outputs(piece.weights, piece.head.event_ndim, piece.output))
    value = weighted_nll(piece.head, z, targets, piece.weights)
    score = apply_weights(piece.weights, piece.head.event_ndim, piece.head.score(z, targets))
    return scale * value, (-scale * score).astype(piece.output.dtype)


def gauss_newton_piece(
    make_metric: Callable[..., Any],
    model: Callable[[Any], Array],
    head: Head,
    params: Any,
    examples: Examples,
) -> GaussNewtonPiece:
    """Linearises ``model(params) -> z`` once and fixes the metric at its output."""
    linearization = Linearization.of(model, params)
    weights = example_weights(head, linearization.output, examples.weights)
    z = mask_outputs(weights, head.event_ndim, linearization.output)
    return GaussNewtonPiece(linearization, make_metric(head, z, examples), weights, head)


def hessian_piece(
    model: Callable[[Any], Array], head: Head, params: Any, examples: Examples
) -> HessianPiece:
    """Linearises the gradient once, with the output beside it."""

    def output_and_gradient(params: Any) -> tuple[Array, Any]:
        def loss(params: Any) -> tuple[Array, Array]:
            z = model(params)
            weights = example_weights(head, z, examples.weights)
            return weighted_nll(head, z, examples.targets, weights), z

        gradient, z = jax.grad(loss, has_aux=True)(params)
        return z, gradient

    linearization = Linearization.of(output_and_gradient, params)
    weights = example_weights(head, linearization.output[0], examples.weights)
    return HessianPiece(linearization, weights, head)
