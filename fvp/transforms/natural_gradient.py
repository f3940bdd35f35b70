"""Optax transformations: a damped solve with the curvature of the batch, its step controlled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike

from fvp.control import DampingRule, LevenbergMarquardt, SearchedDamping
from fvp.curvature import OutputCurvature
from fvp.heads import Head
from fvp.mesh import AxisName
from fvp.solvers import DampedSolver
from fvp.transforms.options import check_order, checked_options, damped_solver
from fvp.transforms.transform import build_transform
from fvp.typing import ModelFn

ScalarOrSchedule = ArrayLike | Callable[[Array], ArrayLike]
Damping = ScalarOrSchedule | DampingRule


def scale_by_fisher(
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Damping | None = None,
    curvature: str | type[OutputCurvature] = "fisher",
    solver: str | DampedSolver = "cg",
    maxiter: Any = None,
    tol: ArrayLike | None = None,
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

    - ``batch``: what ``model_fn`` reads; ``()`` where it reads nothing;
    - ``targets``: labels: adaptive damping tries each step on their mean nll and, with nothing set,
      noise is looked for; the curvatures "ggn" and "empirical" need them;
    - ``weights``: as in `fvp.fisher`;
    - ``operator``: a curvature operator that the caller built, instead of ``batch``, so that
      gradient and curvature share one linearisation (``operator.value_and_grad(targets)``);
    - ``all_params``: the whole parameter tree, under ``optax.masked`` or ``optax.partition``: the
      model is evaluated on it, and the curvature is the exact block of the unmasked leaves;
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

    **Noise.** With nothing set (``damping``, ``max_kl``, ``line_search``, ``geodesic``) and the
    loss known, what a step claims is held against the next batch: noise leads as soon as the loss
    of fresh batches has fallen by less than 3/4 of what steps achieved on their own, in sums with
    a memory of ten steps; in small batches the second step may find that. The last step is then
    taken back, or some ten where the loss has risen, and from there on no batch is solved for: the
    direction is the gradient over the root of its averaged squares, in the eigenbases of its
    averaged outer products along the axes of a parameter; steps go to the average of where such
    directions lead; and their length is learned from the slope of the next batch along them. A
    learning rate multiplies that length, which makes up for slow changes of it: no schedule is
    needed. After 50 such steps, where they are more work than the gradients of small batches, the
    mean of two makes one step, later of up to four, and the updates until then are zero.
    ``state.noise.leads`` says whether noise leads; full batches never get there.
    ``damping=fvp.LevenbergMarquardt()`` goes on solving whatever the batches are.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the curvature, a number or an optax schedule, with
        which no step is tried and nothing adapts: too small a number can diverge; or a
        `fvp.DampingRule` such as `fvp.LevenbergMarquardt`, which adapts it and
        rejects bad steps. None, the default, takes the latter until the noise of the batches
        leads (see **Noise** above). With an exact solver and ``line_search="loss"`` it is 0 as long
        as the search leaves 1/16 of a step, and else follows how much that is.
      curvature: "fisher", "ggn" or "empirical", or a subclass of `fvp.OutputCurvature`.
      solver: "cg"; "dual", an exact solve in the space of examples x outputs
        (`fvp.solve_dual`; pass ``targets=`` to keep its digits at tiny damping); "dense", an
        exact solve with the (P, P) matrix; or "auto", which takes "dual" where examples x outputs
        are at most 4096 and fewer than the parameters, "dense" where the parameters are at most
        1024, and else "cg"; both limits are 8192 where steps may go without damping. The exact
        ones keep the damping above rounding: sqrt(eps) trace(F), or with ``targets=`` 8 eps
        trace(F); where steps may go without, "dense", and "auto" unless parameters are more than 16
        times the rows, factorise the Jacobian, by QR, and need 64 eps^2 trace(F) alone. Strings
        are short names of the objects `fvp.CG`, `fvp.Dual`, `fvp.Dense` and `fvp.Auto`; any other
        `fvp.DampedSolver` serves as well.
      maxiter: most CG iterations. None is 11; with adaptive damping, up to ten times as many while
        steps make little progress, gradients agree and CG ends at the limit.
      tol: CG stops at this relative residual; None is 0.01.
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
        direction, is added (geodesic acceleration), unless that is longer than 3/4 of the
        direction. With ``line_search="loss"`` every length that is tried is corrected, up to eight
        times where the solver is exact, by the damped solution for what its outputs are off from
        where the linear model has them: a forward pass and one more solve with the same factors.
        Least squares in badly scaled parameters, such as PDE residuals, then take far longer steps.
      chunk_size: examples linearised at a time, see `fvp.fisher`.
      batch_axes: the example axes of ``batch``, see `fvp.fisher`.
      axis_name: mesh axes that the batch is split over inside ``shard_map``, see
        `fvp.fisher`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; diagnostics are in its state, for example
      ``optax.tree.get(state, "iterations")``.

    Examples:
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
        "scale_by_fisher",
        None,
        model_fn,
        head,
        damping=damping,
        curvature=curvature,
        solver=damped_solver(solver, maxiter, tol, warm_start),
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
    curvature: str | type[OutputCurvature] = "fisher",
    solver: str | DampedSolver = "cg",
    maxiter: Any = None,
    tol: ArrayLike | None = None,
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

    ``update`` takes ``params`` and the keywords

    - ``batch``: what ``model_fn`` reads; ``()`` where it reads nothing;
    - ``targets``: labels: adaptive damping tries each step on their mean nll and, with nothing set,
      noise is looked for; the curvatures "ggn" and "empirical" need them;
    - ``value_fn``, and ``value``: another loss to try steps on, ``value_fn(params, batch)``;
    - ``weights``, ``operator``, ``all_params``: as in `scale_by_fisher`, which says more of each.

    The gradient must be that of the mean loss over the same batch and weights. What is tried is the
    step that is returned, the learning rate included; a rejected step is zeros. With nothing set,
    and the loss known, the noise of mini-batches comes to lead: no batch is solved for from there
    on, and steps along whitened gradients go to an average of iterates, at a length that is
    learned.

    Args:
      learning_rate: number or optax schedule that multiplies the direction; 1 is Newton's step.
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the curvature, a number or an optax schedule, with
        which no step is tried and nothing adapts: too small a number can diverge; or a
        `fvp.DampingRule` such as `fvp.LevenbergMarquardt`, which adapts it and
        rejects bad steps. None, the default, takes the latter until the noise of the batches
        leads (see **Noise** in `scale_by_fisher`). With an exact solver and ``line_search="loss"``
        it is 0 as long as the search leaves 1/16 of a step, and else follows how much that is.
      curvature: "fisher", "ggn" or "empirical", or a subclass of `fvp.OutputCurvature`.
      solver: "cg"; "dual", an exact solve in the space of examples x outputs
        (`fvp.solve_dual`; pass ``targets=`` to keep its digits at tiny damping); "dense", an
        exact solve with the (P, P) matrix; or "auto", which takes "dual" where examples x outputs
        are at most 4096 and fewer than the parameters, "dense" where the parameters are at most
        1024, and else "cg"; both limits are 8192 where steps may go without damping. The exact
        ones keep the damping above rounding: sqrt(eps) trace(F), or with ``targets=`` 8 eps
        trace(F); where steps may go without, "dense", and "auto" unless parameters are more than 16
        times the rows, factorise the Jacobian, by QR, and need 64 eps^2 trace(F) alone. Strings
        are short names of the objects `fvp.CG`, `fvp.Dual`, `fvp.Dense` and `fvp.Auto`; any other
        `fvp.DampedSolver` serves as well.
      maxiter: most CG iterations. None is 11; with adaptive damping, up to ten times as many while
        steps make little progress, gradients agree and CG ends at the limit.
      tol: CG stops at this relative residual; None is 0.01.
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
        direction, is added (geodesic acceleration), unless that is longer than 3/4 of the
        direction. With ``line_search="loss"`` every length that is tried is corrected, up to eight
        times where the solver is exact, by the damped solution for what its outputs are off from
        where the linear model has them: a forward pass and one more solve with the same factors.
        Least squares in badly scaled parameters, such as PDE residuals, then take far longer steps.
      chunk_size: examples linearised at a time, see `fvp.fisher`.
      batch_axes: the example axes of ``batch``, see `fvp.fisher`.
      axis_name: mesh axes that the batch is split over inside ``shard_map``, see
        `fvp.fisher`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; diagnostics are in its state, for example
      ``optax.tree.get(state, "damping")``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, fvp
      >>> model = lambda w, x: x @ w
      >>> x, y, w = jnp.eye(2), jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1))
      >>> loss = lambda w: fvp.Gaussian().nll(model(w, x), y).mean()
      >>> tx = fvp.natural_gradient(1.0, model, fvp.Gaussian())
      >>> state = tx.init(w)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w, batch=x, targets=y)
      ...     w = optax.apply_updates(w, updates)
      >>> print(jnp.round(w, 3))
      [[1.]
       [2.]]

    Reference:
      S. Amari, Natural gradient works efficiently in learning, 1998.
    """
    return _transform(
        "natural_gradient",
        learning_rate,
        model_fn,
        head,
        damping=damping,
        curvature=curvature,
        solver=damped_solver(solver, maxiter, tol, warm_start),
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


def _transform(
    name: str, learning_rate: Any, model_fn: ModelFn, head: Head, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Both transformations: the step is the direction itself, or -learning_rate times it."""
    check_order(name, learning_rate, model_fn, head)
    rule, searched = LevenbergMarquardt(), options["line_search"] == "loss"
    if options["damping"] is None and searched and options["solver"].direct:
        rule, options["solver"] = SearchedDamping(), options["solver"].without_damping()
    return build_transform(
        checked_options(learning_rate, model_fn, head, default_rule=rule, **options)
    )
