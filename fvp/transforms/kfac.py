"""K-FAC as an optax transformation."""

from __future__ import annotations

from typing import Any

import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fvp.control import ReductionRatio
from fvp.curvature import OutputCurvature
from fvp.heads import Head
from fvp.solvers import KFACSolver
from fvp.transforms.natural_gradient import Damping
from fvp.transforms.options import check_order, checked_options
from fvp.transforms.transform import build_transform
from fvp.typing import ModelFn


def scale_by_kfac(
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Damping | None = None,
    initial_damping: float = 0.1,
    curvature: str | type[OutputCurvature] = "fisher",
    example_batch: Any = None,
    decay: float = 0.95,
    factor_period: int = 1,
    inverse_period: int | None = None,
    rule: str = "pi",
    weight_sharing: str = "expand",
    num_samples: int | None = 1,
    seed: int = 0,
    momentum: bool | str | None = "quadratic",
    max_kl: ArrayLike | None = None,
    constant_kl: bool = False,
    l2: ArrayLike | None = None,
    line_search: str | None = None,
    batch_axes: Any = 0,
    fallback: str | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of the damped Kronecker-factored Fisher.

    Un-negated, like ``optax.scale_by_adam``. The length of the step, and that of the last step
    added to it, minimise the quadratic model of the loss with the exact Fisher of the batch, over
    both at once; that costs two JVPs. The gradient must be that of the mean loss over the same
    batch and weights.

    It is `fvp.scale_by_fisher` with ``solver=fvp.KFACSolver(...)``: ``update`` takes the same
    keywords, options of the same name mean the same, and the state is the same, with the factors in
    its ``solver``. ``targets`` are labels: adaptive damping tries each step on their mean nll and,
    with nothing set, noise is looked for; the curvatures "ggn" and "empirical" need them. Where
    anything is not finite or, under adaptive damping, the loss does not fall, the update is zeros
    and ``accepted`` in the state is False.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the factored and to the exact Fisher: a number or
        an optax schedule, with which no step is tried, or a `fvp.DampingRule`. None is
        ``fvp.ReductionRatio(initial_damping)``, which adapts it by the reduction of the loss on the
        batch, compared with that of the quadratic model (Levenberg-Marquardt), until the noise of
        the batches leads (see **Noise** in `fvp.scale_by_fisher`).
      initial_damping: where that adaptation starts.
      curvature: the exact curvature that chooses the length; as in `fvp.scale_by_fisher`.
      example_batch: a batch, or a tree of ``jax.ShapeDtypeStruct`` like one, from which ``init``
        knows the layers. With it the factors are averages over steps; without it they are those of
        each step's batch.
      decay: of those averages, which carry their weight: the first steps are not biased.
      factor_period: steps between two updates of the averages.
      inverse_period: steps between two inversions of them, the dearest part of a step; None is 5
        with ``example_batch`` and 1 without. After a rejected step they are inverted anew.
      rule: how damping enters the factors, see `fvp.KFAC.inverse`.
      weight_sharing: "expand" or "reduce", see `fvp.kfac`.
      num_samples: labels drawn from the model for each example, for Monte Carlo factors at the cost
        of that many backward passes; None takes exact ones, with one for each column of S.
      seed: of those draws, with the number of the step.
      momentum: "quadratic" lets the last step take part in the quadratic model; None does not.
        True and False are old names of them.
      max_kl: bound on the mean KL divergence of the step, see `fvp.scale_by_fisher`.
      constant_kl: scale every step to exactly ``max_kl``.
      l2: adds l2/2 |params|^2 to the loss, see `fvp.scale_by_fisher`.
      line_search: None, "loss" or "outputs", see `fvp.scale_by_fisher`.
      batch_axes: where the example axis of each leaf of ``batch`` is.
      fallback: see `fvp.kfac`.
      mesh: the devices among which inversions are shared, see `fvp.KFAC.inverse`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; diagnostics are in its state.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> model = lambda w, x: x @ w
      >>> x, y = jnp.eye(2), jnp.array([[1.0], [2.0]])
      >>> tx = fvp.scale_by_kfac(model, fvp.Gaussian(), damping=0.0)
      >>> w = jnp.zeros((2, 1))
      >>> grad = jax.grad(lambda w: fvp.Gaussian().nll(model(w, x), y).mean())(w)
      >>> direction, state = tx.update(grad, tx.init(w), w, batch=x)
      >>> print(jnp.round(w - direction, 4))  # least squares, solved in one step
      [[1.]
       [2.]]

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015.
    """
    check_order("scale_by_kfac", None, model_fn, head)
    solver = KFACSolver(
        example_batch=example_batch,
        decay=decay,
        factor_period=factor_period,
        inverse_period=inverse_period,
        rule=rule,
        weight_sharing=weight_sharing,
        num_samples=num_samples,
        seed=seed,
        fallback=fallback,
        mesh=mesh,
    )
    if isinstance(momentum, bool):
        momentum = "quadratic" if momentum else None
    return build_transform(
        checked_options(
            None,
            model_fn,
            head,
            damping=damping,
            default_rule=ReductionRatio(initial_damping),
            curvature=curvature,
            solver=solver,
            momentum=momentum,
            max_kl=max_kl,
            constant_kl=constant_kl,
            l2=l2,
            line_search=line_search,
            geodesic=False,
            chunk_size=None,
            batch_axes=batch_axes,
            axis_name=None,
        )
    )
