"""The five curvatures, and any other of the form J^T H J. Each is linearised once, when built."""

from __future__ import annotations

import jax
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_positive_int
from fvp.curvature.exact_hessian import ExactHessian
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.operator import CurvatureOperator, build_operator
from fvp.curvature.output_curvature import (
    EmpiricalCurvature,
    FisherCurvature,
    HessianCurvature,
    OutputCurvature,
    SampledCurvature,
    check_output_curvature,
)
from fvp.curvature.problem import Problem, required_targets
from fvp.heads import Head
from fvp.mesh import AxisName
from fvp.typing import Batch, ModelFn, Params, PyTree


def gauss_newton(
    kind: type[OutputCurvature],
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    *,
    targets: PyTree = None,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""The curvature sum_i w_i J_i^T H_i J_i / sum_i w_i of any H in the space of the outputs.

    Args:
      kind: class of the output curvature H, a subclass of `fvp.OutputCurvature`.
      model_fn: as all other arguments, described at `fvp.fisher`.
      head: see there.
      params: see there.
      batch: see there.
      targets: what ``kind`` reads as ``problem.targets``.
      weights: see there.
      chunk_size: see there.
      batch_axes: see there.
      axis_name: see there.

    Returns:
      A `CurvatureOperator`. `fvp.solve_dual` takes it where H has a root.

    Raises:
      TypeError: if ``kind`` is not an output curvature, or as `fvp.fisher`.
      ValueError: as `fvp.fisher`.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [0.0]])
      >>> model, w = lambda w, x: x @ w, jnp.zeros((1, 1))
      >>> E = fvp.gauss_newton(fvp.EmpiricalCurvature, model, fvp.Sigmoid(), w, x, targets=y)
      >>> print(E @ jnp.ones((1, 1)))  # mean of (x / 2)^2
      [[0.625]]

    Reference:
      N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
    """
    check_output_curvature(kind, "kind")
    targets = required_targets(targets) if kind.reads_targets else targets
    problem = Problem.of(
        model_fn,
        head,
        params,
        batch,
        targets=targets,
        weights=weights,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )
    return build_operator(gauss_newton_of(kind), problem, chunk_size)


def fisher(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""True Fisher information, F = sum_i w_i J_i^T F_R(z_i) J_i / sum_i w_i.

    The expectation is over the model's own labels, in closed form: no data labels enter. It is
    positive semi-definite, equals the GGN when z is the natural parameter, and approximates the
    Hessian of the loss once the model fits the data.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``: a function, or a pytree that is
        callable, such as a ``jax.tree_util.Partial`` or a module, whose arrays are held fixed.
      head: output distribution, such as ``fvp.Softmax()``.
      params: pytree of floating-point arrays; ``None`` leaves are allowed.
      batch: pytree that ``model_fn`` reads; leaves that are not arrays are static.
      weights: one weight per example, shape = batch axes of z or broadcastable to it, in one way:
        one weight for each of B examples of (B, T) batch axes is ``weights[:, None]``. A zero
        removes its row, whatever its targets and outputs hold; inputs of it that are not finite
        are replaced by those of a row with weight, in floating-point leaves of ``batch`` whose
        example axis is as long as that of z. Its finite inputs still pass through the model, which
        has to be differentiable there. ``None`` means equal weights.
      chunk_size: examples linearised at a time. ``None`` stores the residuals of the whole batch
        (fast); a number recomputes them inside each product (small). The result is the same as
        long as the model treats examples independently.
      batch_axes: where the example axis of each leaf of ``batch`` is, in the form of the
        ``in_axes`` of ``jax.vmap``; ``None`` marks leaves shared by all examples. Read only with
        ``chunk_size`` or ``weights``.
      axis_name: inside ``jax.shard_map`` (or a named ``vmap``), the mesh axis or axes that the
        batch is split over, so that the weighted mean is over all devices. Under ``jit`` with
        sharded arrays leave it None.

    Returns:
      A `CurvatureOperator` over trees like ``params``.

    Raises:
      ValueError: for shapes or structures that do not fit.
      TypeError: for leaves that are not floating-point, or arguments of the wrong kind.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print(F @ jnp.ones((2, 1)))  # X^T X v / N
      [[12.]
       [17.]]

    Reference:
      S. Amari, Natural gradient works efficiently in learning, 1998; N. Schraudolph, Fast curvature
      matrix-vector products for second-order gradient descent, 2002.
    """
    options = {"weights": weights, "batch_axes": batch_axes, "axis_name": axis_name}
    problem = Problem.of(model_fn, head, params, batch, **options)
    return build_operator(gauss_newton_of(FisherCurvature), problem, chunk_size)


def ggn(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""Generalised Gauss-Newton matrix, G = sum_i w_i J_i^T [d^2 nll_i / dz^2] J_i / sum_i w_i.

    The Hessian of the loss with the model replaced by its linearisation. For heads over natural
    parameters (`fvp.NaturalHead`) the targets cancel and G equals the Fisher; rows of
    `fvp.Softmax` targets that do not sum to one count by their sum. For others, such as
    `fvp.LearnedScaleGaussian`, G may be indefinite.

    Args, returns, raises: as `fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.
    """
    options = {"weights": weights, "batch_axes": batch_axes, "axis_name": axis_name}
    problem = Problem.of(
        model_fn, head, params, batch, targets=required_targets(targets), **options
    )
    return build_operator(gauss_newton_of(HessianCurvature), problem, chunk_size)


def empirical_fisher(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""Empirical Fisher, E = sum_i w_i g_i g_i^T / sum_i w_i, with g_i = J_i^T score(z_i, y_i).

    The second moment of the per-example gradients at the data's labels, uncentred. It is the
    Fisher only in expectation and only where the model's distribution is the data's: as the
    training loss goes to zero so do the g_i, and E with them, while the Fisher does not; and at a
    misfit E grows with the squared residuals (Kunstner et al. 2019 show steps that point away from
    the natural gradient). Use it for what it is, the noise covariance of the gradient, or
    where a score-based statistic calls for it. Every batch axis counts: with (B, T) batch axes the
    examples are the B T tokens.

    Args, returns, raises: as `fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.

    Reference:
      F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for
      natural gradient descent, 2019.
    """
    options = {"weights": weights, "batch_axes": batch_axes, "axis_name": axis_name}
    problem = Problem.of(
        model_fn, head, params, batch, targets=required_targets(targets), **options
    )
    return build_operator(gauss_newton_of(EmpiricalCurvature), problem, chunk_size)


def mc_fisher(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    key: Array,
    *,
    num_samples: int = 1,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""Monte Carlo Fisher: the outer products of scores at labels drawn from the model.

    Unbiased for `fvp.fisher`, of rank at most examples x ``num_samples``. The labels are
    drawn once, from ``key``: every product is by the same matrix, so it can be solved with, and
    neither ``chunk_size`` nor sharding changes it.

    Args, returns, raises: as `fvp.fisher`, with ``key``, a ``jax.random`` key, and
    ``num_samples``, the labels drawn for each example. The batch axis of z comes first.
    """
    check_positive_int(num_samples, "num_samples")
    shard = None if axis_name is None else jax.lax.axis_index(axis_name)
    keys = jax.random.split(key, num_samples)
    options = {"weights": weights, "batch_axes": batch_axes, "axis_name": axis_name}
    problem = Problem.of(model_fn, head, params, batch, keys=keys, shard=shard, **options)
    return build_operator(gauss_newton_of(SampledCurvature), problem, chunk_size)


def hessian(
    model_fn: ModelFn,
    head: Head,
    params: Params,
    batch: Batch,
    targets: PyTree,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: PyTree = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""The Hessian of the mean loss, G plus the curvature of the model itself; may be indefinite.

    Linearises the gradient once; each product is one linear VJP of it.

    Args, returns, raises: as `fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.
    """
    options = {"weights": weights, "batch_axes": batch_axes, "axis_name": axis_name}
    problem = Problem.of(
        model_fn, head, params, batch, targets=required_targets(targets), **options
    )
    return build_operator(ExactHessian.of, problem, chunk_size)
