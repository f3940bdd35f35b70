"""Influence functions: what one more training example would do to the loss of another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_nonnegative
from fvp.compilation import compiled_when_eager
from fvp.curvature import FisherCurvature, HessianCurvature, Problem
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.linearization import Linearization
from fvp.curvature.operator import build_operator
from fvp.curvature.problem import required_targets
from fvp.heads import Head
from fvp.layers import KFACInverse
from fvp.layers.columns import check_not_negative
from fvp.layers.kfac import kfac_of
from fvp.numerics import widen
from fvp.solvers import cg
from fvp.typing import Batch, ModelFn, Params, PyTree


def influence(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    train: Batch,
    query: Batch,
    *,
    damping: ArrayLike,
    train_targets: PyTree,
    query_targets: PyTree,
    weights: ArrayLike | None = None,
    batch_axes: PyTree = 0,
    tol: ArrayLike | None = None,
    maxiter: int | None = None,
) -> Array:
    r"""Influence of training examples on queries, -g_query^T (H + damping I)^-1 g_example.

    g are the gradients of single losses, H is the GGN of the *mean* training loss. An example that
    enters the mean loss of N examples with weight 1 / N more changes the parameters by
    -(H + damping I)^-1 g_example / N, and the loss of the query by its influence / N: negative
    influence helps. Leaving the example out changes the loss by -influence / N. ``damping`` is the
    l2 coefficient of the training loss, where there is one, or larger.

    Each query is a solve by conjugate gradients, preconditioned with eigenvalue-corrected K-FAC
    where every parameter has a layer rule (`fvp.kfac`), and by nothing elsewhere. The scores
    of all examples then come from one JVP, g_example . s = -score^T J s: no per-example gradient is
    formed, and one solution is held at a time.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``; its GGN must be positive semi-definite,
        as it is where z is the natural parameter.
      params: pytree of floating-point arrays, a minimum of the training loss.
      train: pytree that ``model_fn`` reads: the training examples.
      query: pytree that ``model_fn`` reads: the queries.
      damping: number or scalar array, 0 or more; 0 where H has an inverse.
      train_targets: labels of the training examples, as the head's ``nll`` takes them.
      query_targets: labels of the queries.
      weights: weights of the training examples in H, 0 or more.
      batch_axes: where the example axis of each leaf of both batches is.
      tol: of the solves, relative to the gradient of a query; the rounding unit to the power 2/3
        when None.
      maxiter: most iterations of a solve; see `fvp.cg`.

    Returns:
      An array (queries, examples) in float32 or wider. An example is an entry of the first axis of
      z; its loss is the sum over its other batch axes.

    Raises:
      ValueError: for targets or weights that don't fit, and numbers that are negative.
      TypeError: for leaves that are not floating-point.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [0.0]])
      >>> scores = fvp.influence(
      ...     lambda w, x: x @ w, fvp.Gaussian(), jnp.array([[0.2]]), x, x[:1],
      ...     damping=0.0, train_targets=y, query_targets=y[:1],
      ... )
      >>> print(scores.round(3))  # -g_1 [g_1, g_2] / H, g = (-0.8, 0.8), H = 5 / 2
      [[-0.256  0.256]]

    Reference:
      P. W. Koh, P. Liang, Understanding black-box predictions via influence functions, 2017;
      R. Grosse et al., Studying large language model generalization with influence functions, 2023.
    """
    check_nonnegative(damping, "damping")
    check_not_negative(weights)
    data = {"targets": required_targets(train_targets), "weights": weights}
    training = Problem.of(model_fn, head, params, train, batch_axes=batch_axes, **data)
    if query_targets is None:
        raise ValueError("query_targets: expected the labels of the queries, got None.")
    data = {"targets": query_targets, "batch_axes": batch_axes}
    queries = Problem.of(model_fn, head, params, query, **data)
    return _influence(training, queries, jnp.asarray(damping), tol, maxiter)


@compiled_when_eager
def _influence(
    training: Problem, queries: Problem, damping: Array, tol: ArrayLike | None, maxiter: int | None
) -> Array:
    operator = build_operator(gauss_newton_of(HessianCurvature), training, None)
    jacobian = operator.linearized.jacobian
    assert jacobian is not None
    scores = training.head.score(widen(operator.linearized.output), training.targets)
    model = Linearization.of(queries.outputs, queries.params)
    losses = -queries.head.score(widen(model.output), queries.targets)
    level = jnp.finfo(losses.dtype).eps ** (2 / 3) if tol is None else tol
    inverse = _preconditioner(training, damping)

    def of_query(i: Array) -> Array:
        own = (jnp.arange(len(losses)) == i).reshape(-1, *(1,) * (losses.ndim - 1))
        gradient = model.vjp(jnp.where(own, losses, 0).astype(model.output.dtype))
        s, _ = cg(operator, gradient, damping=damping, M=inverse, tol=level, maxiter=maxiter)
        return jnp.sum(scores * widen(jacobian.jvp(s)), axis=tuple(range(1, scores.ndim)))

    return jax.lax.map(of_query, jnp.arange(len(losses)))


def _preconditioner(problem: Problem, damping: Array) -> KFACInverse | None:
    """(EK-FAC + damping I)^-1; None where the layers of the model have no such factors."""
    try:
        factors = kfac_of(problem, FisherCurvature, eigenvalue_corrected=True)
    except ValueError:  # names a use without a layer rule, or where the examples meet
        return None
    size: Any = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    trace = factors.trace()
    # Directions that the factors see nothing of, where the damping is zero.
    least = jnp.finfo(trace.dtype).eps ** 0.5 * trace / size
    least = jnp.where(trace > 0, least, 1)
    return factors.inverse(damping.astype(trace.dtype) + least)
