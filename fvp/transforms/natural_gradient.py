"""Optax transformations: a damped solve with the curvature of the batch, its step controlled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike

from fvp.control import LevenbergMarquardt
from fvp.control.budget import ITERATIONS
from fvp.control.fixed import FixedDamping
from fvp.curvature.operators import ModelFn
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.mesh import AxisName
from fvp.solvers import SOLVERS
from fvp.transforms.engine import build_transform
from fvp.transforms.options import ADAPTIVE, CURVATURES, Options, check_numbers
from fvp.transforms.subset import OnSubset

ScalarOrSchedule = ArrayLike | Callable[[Array], ArrayLike]
Damping = ScalarOrSchedule | LevenbergMarquardt


def scale_by_fisher(
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Damping | None = None,
    curvature: str = "fisher",
    solver: str = "cg",
    maxiter: Any = None,
    tol: ArrayLike = 0.01,
    warm_start: bool = False,
    momentum: ScalarOrSchedule | str | None = None,
    max_kl: ArrayLike | None = None,
    constant_kl: bool = False,
    l2: ArrayLike | None = None,
    line_search: str | None = None,
    geodesic: bool = False,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of the damped curvature: (F + damping I)^-1 g.

    Un-negated, like ``optax.scale_by_adam``. The gradient must be that of the mean loss
    L = sum_i w_i nll_i / sum_i w_i over the same batch and weights, since the curvature is on
    that scale.

    ``update`` takes ``params`` and the keywords

    - ``batch``: what ``model_fn`` reads;
    - ``targets``: labels, for the curvatures "ggn" and "empirical";
    - ``weights``: as in :func:`fvp.fisher`;
    - ``operator``: a curvature operator that the caller built, instead of ``batch``, so that
      gradient and curvature share one linearisation (``operator.value_and_grad(targets)``);
    - ``all_params``: the whole parameter tree, under ``optax.masked`` or ``optax.partition``: the
      model is evaluated on it, and the curvature is the exact block of the unmasked leaves.

    - ``value_fn``, and ``value``: the loss as ``value_fn(params, batch)``, and its value at
      ``params``; adaptive damping tries the step on it, or else on the head's mean nll at
      ``targets``, or without both on the KL divergence that it makes. Pass it where the gradient
      is not that of the mean nll: a penalty added by hand, a sum, a policy gradient.

    Other keywords are ignored. Where the gradient or the solution is not finite, or no descent was
    found, the update is zero, the warm start is kept and ``accepted`` in the state is False. Under
    adaptive damping so is a step that raises the loss on its batch; momentum starts anew then.
    After a rejection on ``targets`` the gradient's slope along the step is compared with that of
    the mean nll, at a backward pass: ``gradient_mismatch`` in the state says whether they differed
    by more than a tenth at the last rejected step, and stays False where no step is tried.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the curvature, a number or an optax schedule, with
        which no step is tried and nothing adapts: too small a number can diverge; or
        :class:`fvp.LevenbergMarquardt`, which adapts it and rejects bad steps. None, the default,
        takes the latter, but 0 with an exact solver and ``line_search="loss"``, where the search
        alone controls the step.
      curvature: "fisher", "ggn" or "empirical".
      solver: "cg"; "dual", an exact solve in the space of examples x outputs
        (:func:`fvp.solve_dual`; pass ``targets=`` to keep its digits at tiny damping); "dense", an
        exact solve with the (P, P) matrix; or "auto", which takes "dual" where examples x outputs
        are at most 4096 and fewer than the parameters, "dense" where the parameters are at most
        1024, and else "cg". The exact ones keep the damping above rounding: sqrt(eps)
        trace(F), or "dual" with ``targets=``, eps trace(F) for each of its rows.
      maxiter: most CG iterations. None is 11; with adaptive damping, up to ten times as many while
        steps make little progress, gradients agree and CG ends at the limit.
      tol: CG stops at this relative residual.
      warm_start: start CG at 0.95 times the last solution; costs one product.
      momentum: in [0, 1), a number or an optax schedule: SPRING's, where damping pulls towards
        momentum times the last direction instead of zero, and CG starts there, which costs one
        product. "quadratic": the step is the best combination of the direction and the last one in
        the quadratic model, which costs two JVPs. None is no momentum with a given damping;
        with the adaptive one it is 0.9 where gradients agree, and else grows from 0.75 to that in
        the first 36 steps.
      max_kl: bound on the mean KL divergence of the step that is returned, in nats. The step is
        scaled to 1/2 s^T F s <= max_kl, then corrected until the head's exact divergence is at most
        5% above the bound; each correction costs a forward pass.
      constant_kl: scale every step to exactly ``max_kl``.
      l2: adds l2/2 |params|^2 to the loss: to the gradient (pass that of the loss alone), the
        curvature and the trial of the step.
      line_search: halves the step until the loss has fallen and half of it would be worse: "loss"
        by the loss itself, at a forward pass each, "outputs" by the loss of the linearised outputs
        z - a J d, at one JVP for all. A step that raises the loss is then rejected, whatever the
        damping.
      geodesic: whether the step bends with the outputs: half the square of its length times
        (curvature + damping)^-1 J^T H z'', with z'' the second derivative of the outputs along the
        direction, is added (geodesic acceleration), unless that is longer than 3/4 of the direction
        and no ``line_search="loss"`` shortens it. Costs a JVP of a JVP and a second solve, which is
        cheap where the first was exact. Least squares in badly scaled parameters, such as PDE
        residuals, then take far longer steps.
      chunk_size: examples linearised at a time, see :func:`fvp.fisher`.
      batch_axes: the example axes of ``batch``, see :func:`fvp.fisher`.
      axis_name: mesh axes that the batch is split over inside ``shard_map``, see
        :func:`fvp.fisher`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; diagnostics are in its state, for example
      ``optax.tree.get(state, "iterations")``.

    Example:
      >>> import jax, jax.numpy as jnp, fvp
      >>> model = lambda w, x: x @ w
      >>> x, y = jnp.eye(2), jnp.array([[1.0], [2.0]])
      >>> tx = fvp.scale_by_fisher(model, fvp.Gaussian(), damping=0.0)
      >>> w = jnp.zeros((2, 1))
      >>> grad = jax.grad(lambda w: fvp.Gaussian().nll(model(w, x), y).mean())(w)
      >>> direction, state = tx.update(grad, tx.init(w), w, batch=x)
      >>> print(w - direction)  # least squares, solved in one step
      [[1.]
       [2.]]

    Reference:
      S. Amari, Natural gradient works efficiently in learning, 1998; J. Martens, Deep learning via
      Hessian-free optimization, 2010.
    """
    return _transform(
        None,
        model_fn,
        head,
        damping=damping,
        curvature=curvature,
        solver=solver,
        maxiter=maxiter,
        tol=tol,
        warm_start=warm_start,
        momentum=momentum,
        max_kl=max_kl,
        constant_kl=constant_kl,
        l2=l2,
        line_search=line_search,
        geodesic=geodesic,
        chunk_size=chunk_size,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )


def natural_gradient(
    learning_rate: ScalarOrSchedule,
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Damping | None = None,
    curvature: str = "fisher",
    solver: str = "cg",
    maxiter: Any = None,
    tol: ArrayLike = 0.01,
    warm_start: bool = False,
    momentum: ScalarOrSchedule | str | None = None,
    max_kl: ArrayLike | None = None,
    constant_kl: bool = False,
    l2: ArrayLike | None = None,
    line_search: str | None = None,
    geodesic: bool = False,
    chunk_size: int | None = None,
    batch_axes: Any = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural-gradient descent: -learning_rate (F + damping I)^-1 g, like ``optax.adam``.

    Args:
      learning_rate: number or optax schedule that multiplies the direction; 1 is Newton's step.
      model_fn: as all other arguments, described at :func:`scale_by_fisher`.
      head: see there.
      damping: see there.
      curvature: see there.
      solver: see there.
      maxiter: see there.
      tol: see there.
      warm_start: see there.
      momentum: see there.
      max_kl: see there.
      constant_kl: see there.
      l2: see there.
      line_search: see there.
      geodesic: see there.
      chunk_size: see there.
      batch_axes: see there.
      axis_name: see there.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes ``params`` and ``batch=``.
    """
    return _transform(
        learning_rate,
        model_fn,
        head,
        damping=damping,
        curvature=curvature,
        solver=solver,
        maxiter=maxiter,
        tol=tol,
        warm_start=warm_start,
        momentum=momentum,
        max_kl=max_kl,
        constant_kl=constant_kl,
        l2=l2,
        line_search=line_search,
        geodesic=geodesic,
        chunk_size=chunk_size,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )


def _check_order(learning_rate: Any, model_fn: Any, head: Any) -> None:
    """Raises unless each of the first arguments can be what its place says."""
    name, order = "scale_by_fisher", "model_fn, head"
    if learning_rate is not None:
        name, order = "natural_gradient", "learning_rate, model_fn, head"
    hint = f"; the order is fvp.{name}({order})"
    if isinstance(model_fn, Head) or not callable(model_fn):
        raise TypeError(f"model_fn: expected model_fn(params, batch) -> z, got {model_fn!r}{hint}.")
    check_head(head, hint)
    if isinstance(learning_rate, Head):
        raise TypeError(f"learning_rate: expected a number or a schedule, got a head{hint}.")
    # It may be negative, to climb.
    if isinstance(learning_rate, (int, float)) and not math.isfinite(learning_rate):
        raise ValueError(f"learning_rate: expected a finite number, got {learning_rate}.")


def _transform(
    learning_rate: ScalarOrSchedule | None,
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Damping | None,
    curvature: str,
    momentum: ScalarOrSchedule | str | None,
    max_kl: ArrayLike | None,
    constant_kl: bool,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Both transformations: the step is the direction itself, or -learning_rate times it."""
    _check_order(learning_rate, model_fn, head)
    check_numbers({"l2": options["l2"], "tol": options["tol"]}, damping)
    if curvature not in CURVATURES:
        raise ValueError(f"curvature: expected one of {sorted(CURVATURES)}, got {curvature!r}.")
    if options["solver"] not in SOLVERS:
        raise ValueError(f"solver: expected one of {SOLVERS}, got {options['solver']!r}.")
    if isinstance(momentum, str) and momentum != "quadratic":
        raise ValueError(f'momentum: expected a number or "quadratic", got {momentum!r}.')
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}.")
    if options["line_search"] not in (None, "loss", "outputs"):
        raise ValueError(
            f'line_search: expected "loss" or "outputs", got {options["line_search"]!r}.'
        )
    if max_kl is None and constant_kl:
        raise ValueError("max_kl: constant_kl=True expects the length of the step, got None.")
    if isinstance(max_kl, (int, float)) and not 0 < max_kl < math.inf:
        raise ValueError(f"max_kl: expected a positive number of nats, got {max_kl}.")
    undamped = damping is None and options["line_search"] == "loss" and options["solver"] != "cg"
    if damping is None:
        damping = 0.0 if undamped else LevenbergMarquardt()
    adaptive = isinstance(damping, LevenbergMarquardt)
    if options["maxiter"] is None and not adaptive:
        options["maxiter"] = ITERATIONS
    if momentum is None and adaptive:
        momentum = ADAPTIVE
    elif isinstance(momentum, (int, float)) and momentum == 0:
        momentum = None
    return build_transform(
        Options(
            model_fn=model_fn,
            head=head,
            learning_rate=learning_rate,
            rule=damping if isinstance(damping, LevenbergMarquardt) else FixedDamping(damping),
            exact_only=undamped,
            curvature=curvature,
            momentum=momentum,
            max_kl=max_kl,
            constant_kl=constant_kl,
            on_subset=OnSubset(model_fn),
            **options,
        )
    )
