"""The five curvatures. Each is one metric (or the exact Hessian) on one mechanism."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_positive_int
from fvp.curvature import metrics, pieces
from fvp.curvature.build import build_operator
from fvp.curvature.metrics import Examples
from fvp.curvature.operator import CurvatureOperator
from fvp.heads import Head
from fvp.mesh import AxisName

ModelFn = Callable[[Any, Any], Array]

# Module-level objects: they are static arguments of compiled builds, and hash by identity.
_fisher_piece = functools.partial(pieces.gauss_newton_piece, metrics.fisher_metric)
_ggn_piece = functools.partial(pieces.gauss_newton_piece, metrics.ggn_metric)
_empirical_piece = functools.partial(pieces.gauss_newton_piece, metrics.empirical_metric)
_monte_carlo_piece = functools.partial(pieces.gauss_newton_piece, metrics.monte_carlo_metric)


def fisher(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
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
      A :class:`CurvatureOperator` over trees like ``params``.

    Raises:
      ValueError: for shapes or structures that do not fit.
      TypeError: for leaves that are not floating-point, or arguments of the wrong kind.

    Example:
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
    examples = Examples(weights=weights)
    return build_operator(
        _fisher_piece, model_fn, head, params, batch, examples, chunk_size, batch_axes, axis_name
    )


def ggn(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""Generalised Gauss-Newton matrix, G = sum_i w_i J_i^T [d^2 nll_i / dz^2] J_i / sum_i w_i.

    The Hessian of the loss with the model replaced by its linearisation. For heads over natural
    parameters, which all heads of this library are, the targets cancel and G equals the Fisher;
    rows of :class:`fvp.Softmax` targets that do not sum to one count by their sum.

    Args, returns, raises: as :func:`fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.
    """
    examples = Examples(targets=_required(targets), weights=weights)
    return build_operator(
        _ggn_piece, model_fn, head, params, batch, examples, chunk_size, batch_axes, axis_name
    )


def empirical_fisher(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
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

    Args, returns, raises: as :func:`fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.

    Reference:
      F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for
      natural gradient descent, 2019.
    """
    examples = Examples(targets=_required(targets), weights=weights)
    return build_operator(
        _empirical_piece, model_fn, head, params, batch, examples, chunk_size, batch_axes, axis_name
    )


def mc_fisher(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    key: Array,
    *,
    num_samples: int = 1,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""Monte Carlo Fisher: the outer products of scores at labels drawn from the model.

    Unbiased for :func:`fvp.fisher`, of rank at most examples x ``num_samples``. The labels are
    drawn once, from ``key``: every product is by the same matrix, so it can be solved with, and
    neither ``chunk_size`` nor sharding changes it.

    Args, returns, raises: as :func:`fvp.fisher`, with ``key``, a ``jax.random`` key, and
    ``num_samples``, the labels drawn for each example. The batch axis of z comes first.
    """
    check_positive_int(num_samples, "num_samples")
    shard = None if axis_name is None else jax.lax.axis_index(axis_name)
    keys = jax.random.split(key, num_samples)
    examples = Examples(weights=weights, keys=keys, shard=shard)
    return build_operator(
        _monte_carlo_piece,
        model_fn,
        head,
        params,
        batch,
        examples,
        chunk_size,
        batch_axes,
        axis_name,
    )


def hessian(
    model_fn: ModelFn,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    *,
    weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
    axis_name: AxisName = None,
) -> CurvatureOperator:
    r"""The Hessian of the mean loss, G plus the curvature of the model itself; may be indefinite.

    Linearises the gradient once; each product is one linear VJP of it.

    Args, returns, raises: as :func:`fvp.fisher`, and ``targets``, the labels that the head's
    ``nll`` takes.
    """
    examples = Examples(targets=_required(targets), weights=weights)
    return build_operator(
        pieces.hessian_piece,
        model_fn,
        head,
        params,
        batch,
        examples,
        chunk_size,
        batch_axes,
        axis_name,
    )


def _required(targets: Any) -> Any:
    if targets is None:
        raise ValueError("targets: expected the labels of the batch, got None.")
    return targets
