"""A Gaussian posterior: samples, variances, predictions and the evidence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from fvp.checks import check_nonnegative, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature import Problem
from fvp.curvature.gauss_newton import weighted_nll
from fvp.factorization import eigh_semidefinite
from fvp.heads import Head
from fvp.layers.products import einsum
from fvp.model import Model
from fvp.numerics import cast_like, scan_sum, tree_vdot, wide_dtype, widen
from fvp.posteriors.output_covariance import output_covariance
from fvp.posteriors.structure import Scales, Structure, WhitenedPrecision
from fvp.records import Record
from fvp.typing import Batch, Params, PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class Posterior(Record):
    """Normal(mean, (H + D)^-1), H the curvature of the summed loss, D the prior precision.

    Built by `fvp.laplace`. A pytree: it crosses ``jit``. Calls are compiled when made
    eagerly, and differentiable in the prior precision.

    Attributes:
      mean: the parameters it is around, a pytree.
      prior_precision: a scalar, or a tree like the parameters with a scalar for each leaf.
      structure: the curvature H.
      outputs: z at ``mean`` for the examples that H is of; one array, as ``head`` takes it.
      weights: their weights over the batch axes, or None.
      model: the model function.
      head: the output distribution.
    """

    mean: Params
    prior_precision: PyTree
    structure: Structure
    outputs: Array
    weights: Array | None
    model: Model
    head: Head

    def with_prior_precision(self, prior_precision: PyTree) -> Posterior:
        """The same with another prior, at no new curvature; for tuning it by the evidence.

        Args:
          prior_precision: positive scalar, or a pytree like the parameters with one for each leaf.
        """
        checked = check_prior_precision(prior_precision, self.mean)
        return dataclasses.replace(self, prior_precision=checked)

    def sample(self, key: Array, n: int) -> Params:
        """``n`` draws of the parameters, a pytree like them with a leading axis of ``n``.

        Outputs of the model at them can spread much further than `predictive` says, which takes the
        model for linear over the width of the posterior.
        """
        check_positive_int(n, "n")
        return _sample(self, jax.random.split(key, n))

    def variance(self) -> Params:
        """The variance of each parameter, a pytree like them; zeros where one is known."""
        return _variance(self)

    def predictive(
        self, batch: Batch, *, batch_axes: PyTree = 0, full_covariance: bool = False
    ) -> tuple[Any, Any]:
        r"""Mean and variance of the outputs z of the model linearised at the mean.

        z = f(mean) + J (params - mean), so that Cov z_i = J_i (H + D)^-1 J_i^T. The noise of the
        head is not in it.

        Args:
          batch: what ``model_fn`` reads; examples are taken one by one.
          batch_axes: where the example axis of each leaf of ``batch`` is.
          full_covariance: the covariance of all entries of an event instead of their variances.

        Returns:
          ``(mean, variance)``, both of the shape of z; or the covariance of shape (batch axes, D,
          D) for events of D entries, the event axes in one, and the outputs of
          `fvp.Product` one after the other in the order of their names.
        """
        mean, variance = self._outputs_of(batch, batch_axes, full_covariance)
        return self._by_name(mean), variance if full_covariance else self._by_name(variance)

    def predictive_mean(
        self, batch: Batch, key: Array, *, num_samples: int = 1000, batch_axes: PyTree = 0
    ) -> Any:
        """E[y] under the posterior: the class probabilities of `fvp.Softmax`.

        The mean of ``head.mean(z)`` over ``num_samples`` draws of z as `predictive` has it.

        Args:
          batch: as there.
          key: a ``jax.random`` key.
          num_samples: number of draws for each example.
          batch_axes: as there.

        Returns:
          An array of the shape of ``head.mean(z)``; a dict of them for `fvp.Product`.
        """
        check_positive_int(num_samples, "num_samples")
        mean, covariance = self._outputs_of(batch, batch_axes, full=True)
        return _mean_response(self.head, mean, covariance, jax.random.split(key, num_samples))

    def log_evidence(self, targets: PyTree) -> Array:
        r"""The logarithm of the marginal likelihood, by Laplace's approximation.

        -sum_i w_i nll_i - 1/2 mean^T D mean - 1/2 log det(I + D^(-1/2) H D^(-1/2)). Exact where z
        is linear in the parameters and the head Gaussian. Maximise it to choose a prior precision:

            jax.grad(lambda d: posterior.with_prior_precision(d).log_evidence(targets))(1.0)

        Args:
          targets: labels of the examples that the posterior was built from.

        Returns:
          A scalar in float32 or wider.
        """
        return _log_evidence(self, targets)

    def _outputs_of(self, batch: Batch, batch_axes: PyTree, full: bool) -> tuple[Array, Array]:
        """`predictive` in one array."""
        problem = Problem.of(self.model, self.head, self.mean, batch, batch_axes=batch_axes)
        return _predictive(self, problem, full)

    def _by_name(self, z: Array) -> Any:
        return z if self.model.layout is None else self.model.layout.split(z)

    def _whitened(self) -> tuple[Scales, WhitenedPrecision]:
        """D^(-1/2) and the factorised precision between two of them."""
        part = self.structure.random(self.mean)
        equal = is_number(self.prior_precision)
        spread = lambda tree: jax.tree.map(lambda _: self.prior_precision, tree)
        precision = spread(part) if equal else self.structure.random(self.prior_precision)
        scale = lambda d, x: jax.lax.rsqrt(jnp.asarray(d, wide_dtype(x.dtype)))
        scales = Scales(jax.tree.map(scale, precision, part), part, equal)
        return scales, self.structure.whitened(scales)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.mean))
        return f"Posterior({type(self.structure).__name__}, parameters={size})"


def is_number(prior_precision: PyTree) -> bool:
    """Whether one number serves all leaves."""
    return jax.tree.structure(prior_precision) == jax.tree.structure(0.0)


def check_prior_precision(prior_precision: Any, params: Params) -> PyTree:
    """The prior precision as scalar arrays; raises where it does not fit the parameters."""
    structure, expected = jax.tree.structure(prior_precision), jax.tree.structure(params)
    if not is_number(prior_precision) and structure != expected:
        raise ValueError(
            "prior_precision: expected a number, or a tree like the parameters with one for each"
            f" leaf, {expected}, got {structure}."
        )

    def check(path: Any, leaf: Any) -> Array:
        name = f"prior_precision{jax.tree_util.keystr(path)}"
        check_nonnegative(leaf, name)
        if jnp.shape(leaf) != ():
            raise ValueError(
                f"{name}: expected one number for all entries of a leaf, got shape"
                f" {jnp.shape(leaf)}."
            )
        if not isinstance(leaf, Tracer) and float(leaf) == 0:
            raise ValueError(f"{name}: expected a positive number, got 0.")
        return jnp.asarray(leaf, float)

    return jax.tree_util.tree_map_with_path(check, prior_precision)


@compiled_when_eager
def _sample(posterior: Posterior, keys: Array) -> Params:
    scales, precision = posterior._whitened()
    mean = posterior.structure.random(posterior.mean)
    leaves, structure = jax.tree.flatten(mean)

    def draw(key: Array) -> Params:
        normal = lambda key, x: jax.random.normal(key, x.shape, wide_dtype(x.dtype))
        noise = list(map(normal, jax.random.split(key, len(leaves)), leaves))
        change = scales(precision.colour(jax.tree.unflatten(structure, noise)))
        drawn = cast_like(jax.tree.map(lambda x, d: widen(x) + d, mean, change), mean)
        return posterior.structure.fill(posterior.mean, drawn)

    return jax.vmap(draw)(keys)


@compiled_when_eager
def _variance(posterior: Posterior) -> Params:
    scales, precision = posterior._whitened()
    known = jax.tree.map(lambda x: jnp.zeros_like(widen(x)), posterior.mean)
    return posterior.structure.fill(known, scales(scales(precision.variance())))


@compiled_when_eager
def _predictive(posterior: Posterior, problem: Problem, full: bool) -> tuple[Array, Array]:
    scales, precision = posterior._whitened()
    return output_covariance(problem, posterior.structure, precision, scales, full)


@compiled_when_eager
def _mean_response(head: Head, mean: Array, covariance: Array, keys: Array) -> Any:
    values, vectors = eigh_semidefinite(covariance)
    root = vectors * jnp.sqrt(values)[..., None, :]

    def response(key: Array) -> Any:
        noise = jax.random.normal(key, covariance.shape[:-1], covariance.dtype)
        z = widen(mean) + einsum("...ij,...j->...i", root, noise).reshape(mean.shape)
        return head.mean(z)

    total = scan_sum(response, keys)
    return jax.tree.map(lambda x: (x / len(keys)).astype(mean.dtype), total)


@compiled_when_eager
def _log_evidence(posterior: Posterior, targets: PyTree) -> Array:
    scales, precision = posterior._whitened()
    nll = weighted_nll(posterior.head, posterior.outputs, targets, posterior.weights)
    mean = posterior.structure.random(posterior.mean)
    whitened = jax.tree.map(lambda x, s: widen(x) / s, mean, scales.tree)
    return -nll - 0.5 * tree_vdot(whitened, whitened) - 0.5 * precision.logdet()
