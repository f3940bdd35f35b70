"""Laplace's approximation of a posterior."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature import Problem
from fvp.heads import Head
from fvp.layers.columns import check_not_negative
from fvp.model import Model
from fvp.posteriors.dense import DenseStructure
from fvp.posteriors.diagonal import DiagonalStructure
from fvp.posteriors.kronecker import CorrectedKroneckerStructure, KroneckerStructure
from fvp.posteriors.last_layer import LastLayerStructure
from fvp.posteriors.low_rank import LowRankStructure
from fvp.posteriors.posterior import Posterior, check_prior_precision
from fvp.posteriors.structure import Options, Structure
from fvp.tracing.coverage import check_fallback
from fvp.typing import Batch, ModelFn, Params, PyTree

STRUCTURES: dict[str, type[Structure]] = {
    "dense": DenseStructure,
    "diagonal": DiagonalStructure,
    "ekfac": CorrectedKroneckerStructure,
    "kfac": KroneckerStructure,
    "last_layer": LastLayerStructure,
    "low_rank": LowRankStructure,
}


def laplace(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    *,
    prior_precision: PyTree = 1.0,
    structure: str = "kfac",
    weights: ArrayLike | None = None,
    batch_axes: PyTree = 0,
    fallback: str | None = None,
    last_layer: PyTree = None,
    rank: int = 20,
    key: Array | None = None,
) -> Posterior:
    r"""The Gaussian posterior of the parameters around a minimum, Normal(params, (H + D)^-1).

    H = sum_i w_i J_i^T F_R(z_i) J_i is the Fisher of the *summed* loss, which equals its GGN where
    z is the natural parameter; D = ``prior_precision`` x I is the curvature of the prior
    1/2 prior_precision |params|^2. ``params`` should minimise the sum of both: as a mean of losses,
    with an l2 term of prior_precision / (sum of weights).

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      params: pytree of floating-point arrays, the minimum.
      batch: pytree that ``model_fn`` reads: all examples of the loss.
      prior_precision: positive number, or a pytree like ``params`` with one for each leaf.
      structure: the form that H is held in.
        "dense": the (P, P) matrix;
        "kfac": Kronecker factors of each layer, see `fvp.kfac`; "ekfac": with corrected
        eigenvalues (one number for ``prior_precision``);
        "diagonal": the exact diagonal;
        "last_layer": the dense matrix of the layer that the model uses last, all other parameters
        fixed at ``params``;
        "low_rank": the eigenvectors of the ``rank`` largest eigenvalues.
      weights: one weight of 0 or more per example, shape = batch axes of z or broadcastable to it.
      batch_axes: where the example axis of each leaf of ``batch`` is.
      fallback: of "kfac", "ekfac" and "diagonal", see `fvp.kfac`.
      last_layer: of "last_layer", which leaves it has where the last one used is not meant: a tree
        of bools like ``params``.
      rank: of "low_rank".
      key: of "low_rank", the ``jax.random`` key that eigenvectors are searched from; that of the
        seed 0 when None.

    Returns:
      A `Posterior`: ``.mean``, ``.sample(key, n)``, ``.variance()``, ``.predictive(batch)``,
      ``.predictive_mean(batch, key)``, ``.log_evidence(targets)``, ``.with_prior_precision(d)``.

    Raises:
      ValueError: for an unknown structure, a prior precision that is not positive or does not fit,
        negative weights, or a model that the structure can't take.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [2.0]])
      >>> mean = jnp.array([[5 / 6]])  # of the posterior of a linear regression
      >>> posterior = fvp.laplace(lambda w, x: x @ w, fvp.Gaussian(), mean, x)
      >>> print(f"{posterior.variance().item():.3f}")  # 1 / (1 + 1^2 + 2^2)
      0.167
      >>> z, variance = posterior.predictive(jnp.array([[3.0]]))
      >>> print(f"{z.item():.3f} {variance.item():.3f}")  # the variance is 9 / 6
      2.500 1.500

    Reference:
      D. MacKay, A practical Bayesian framework for backpropagation networks, 1992; H. Ritter et
      al., A scalable Laplace approximation for neural networks, 2018; E. Daxberger et al., Laplace
      redux, 2021.
    """
    if structure not in STRUCTURES:
        expected = ", ".join(map(repr, STRUCTURES))
        raise ValueError(f"structure: expected one of {expected}, got {structure!r}.")
    check_not_negative(weights)
    check_fallback(fallback)
    check_positive_int(rank, "rank")
    options = {"weights": weights, "batch_axes": batch_axes}
    problem = Problem.of(model_fn, head, params, batch, **options)
    precision = check_prior_precision(prior_precision, problem.params)
    key = jax.random.key(0) if key is None else key
    leaves = _marked(last_layer, problem.params)
    found = _curvature(STRUCTURES[structure], problem, Options(rank, key, fallback, leaves))
    model = dataclasses.replace(Model.of(model_fn), layout=problem.model.layout)
    return Posterior(problem.params, precision, *found, model, problem.head)


@compiled_when_eager
def _curvature(
    structure: type[Structure], problem: Problem, options: Options
) -> tuple[Structure, Array, Any]:
    problem = problem.present()
    z = problem.outputs(problem.params)
    weights = problem.example_weights(z)
    return structure.of(problem, options), z, weights


def _marked(mask: PyTree, params: Params) -> tuple[int, ...] | None:
    """The numbers of the leaves that are marked."""
    if mask is None:
        return None
    structure, expected = jax.tree.structure(mask), jax.tree.structure(params)
    leaves = jax.tree.leaves(mask)
    if structure != expected or not all(isinstance(leaf, bool) for leaf in leaves):
        raise ValueError(
            f"last_layer: expected a tree of bools like the parameters, {expected}, got {mask!r}."
        )
    if not any(leaves):
        raise ValueError("last_layer: expected at least one leaf marked True, got none.")
    return tuple(number for number, marked in enumerate(leaves) if marked)
