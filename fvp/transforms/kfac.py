"""K-FAC as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fvp.checks import check_like, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.control import Step
from fvp.control.momentum import best_of_plane
from fvp.control.reduction_ratio import adapted_damping
from fvp.control.trial import loss_outcome, mean_nll
from fvp.curvature import fisher
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.layers import KFAC, kfac
from fvp.numerics import (
    as_finite,
    tree_is_finite,
    tree_vdot,
    tree_where,
)
from fvp.transforms.options import check_numbers
from fvp.transforms.serialization import register_with_flax
from fvp.transforms.trying import gradient_differs

ScalarOrSchedule = ArrayLike | Callable[[Array], ArrayLike]

INVERSE_PERIOD = 5  # steps, where factors are kept between them


class KFACState(NamedTuple):
    """State of :func:`scale_by_kfac`."""

    count: Any  # int32 scalar, updates done
    factors: Any  # KFAC, weighted sums of the factors so far; None without example_batch
    weight: Array  # float32 scalar, the weight of those sums
    inverse: Any  # KFACInverse in use; None without example_batch
    last_step: Any  # like the parameters, the last update
    damping: Array  # float32 scalar, of the next step where it adapts, else of the last
    predicted_kl: Array  # float32 scalar, 1/2 d^T F d of the last step d
    accepted: Array  # bool scalar; a step that was not is zeros
    gradient_mismatch: Array  # bool scalar, what the last rejected step found, see scale_by_fisher


def scale_by_kfac(
    model_fn: Callable[[Any, Any], Array],
    head: Head,
    *,
    damping: ScalarOrSchedule | None = None,
    initial_damping: float = 0.1,
    example_batch: Any = None,
    decay: float = 0.95,
    factor_period: int = 1,
    inverse_period: int | None = None,
    rule: str = "pi",
    weight_sharing: str = "expand",
    num_samples: int | None = 1,
    seed: int = 0,
    momentum: bool = True,
    max_kl: float | None = None,
    batch_axes: Any = 0,
    fallback: str | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of the damped Kronecker-factored Fisher.

    Un-negated, like ``optax.scale_by_adam``. The length of the step, and that of the last step
    added to it, minimise the quadratic model of the loss with the exact Fisher of the batch, over
    both at once; that costs two JVPs. The gradient must be that of the mean loss over the same
    batch and weights.

    ``update`` takes ``params`` and the keywords ``batch``, ``weights`` and ``targets``; others are
    ignored. Where anything is not finite or, with ``damping=None``, the loss does not fall, the
    update is zeros and ``accepted`` in the state is False; ``gradient_mismatch`` then says whether
    the gradient was another loss's, as in :func:`fvp.scale_by_fisher`.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the factored and to the exact Fisher: a number or
        an optax schedule. None adapts it by the reduction of the loss on the batch, compared with
        that of the quadratic model (Levenberg-Marquardt); ``update`` then needs ``targets=``.
      initial_damping: where the adaptation starts.
      example_batch: a batch, or a tree of ``jax.ShapeDtypeStruct`` like one, from which ``init``
        knows the layers. With it the factors are averages over steps; without it they are those of
        each step's batch.
      decay: of those averages, which carry their weight: the first steps are not biased.
      factor_period: steps between two updates of the averages.
      inverse_period: steps between two inversions of them, the dearest part of a step; None is 5
        with ``example_batch`` and 1 without. After a rejected step they are inverted anew.
      rule: how damping enters the factors, see :meth:`fvp.KFAC.inverse`.
      weight_sharing: "expand" or "reduce", see :func:`fvp.kfac`.
      num_samples: labels drawn from the model for each example, for Monte Carlo factors at the cost
        of that many backward passes; None takes exact ones, with one for each column of S.
      seed: of those draws, with the number of the step.
      momentum: whether the last step takes part in the quadratic model.
      max_kl: most predicted KL divergence, 1/2 d^T F d, of a step d; longer ones are shortened.
      batch_axes: where the example axis of each leaf of ``batch`` is.
      fallback: see :func:`fvp.kfac`.
      mesh: the devices among which inversions are shared, see :meth:`fvp.KFAC.inverse`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; diagnostics are in its state.

    Example:
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
    if inverse_period is None:
        inverse_period = 1 if example_batch is None else INVERSE_PERIOD
    check_head(head, "; the order is fvp.scale_by_kfac(model_fn, head)")
    numbers = {"initial_damping": initial_damping, "decay": decay, "max_kl": max_kl}
    check_numbers(numbers, damping)
    check_positive_int(factor_period, "factor_period")
    check_positive_int(inverse_period, "inverse_period")
    adaptive = damping is None
    if example_batch is None and (factor_period > 1 or inverse_period > 1):
        raise ValueError(
            "example_batch: factor_period and inverse_period keep factors between steps, and init"
            " must know their shapes; pass a batch, or jax.ShapeDtypeStructs like one."
        )

    def factor(params: Any, batch: Any, weights: Any, count: Any) -> KFAC:
        key = None
        if num_samples is not None:
            key = jax.random.fold_in(jax.random.key(seed), count)
        return kfac(
            model_fn,
            head,
            params,
            batch,
            weights=weights,
            key=key,
            num_samples=num_samples or 1,
            weight_sharing=weight_sharing,
            batch_axes=batch_axes,
            fallback=fallback,
        )

    def init(params: Any) -> KFACState:
        register_with_flax()
        factors = inverse = None
        if example_batch is not None:
            shapes = jax.eval_shape(lambda p, b: factor(p, b, None, 0), params, example_batch)
            zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
            factors = zeros(shapes)
            inverse = zeros(jax.eval_shape(lambda k: k.inverse(jnp.float32(1), rule=rule), shapes))
        return KFACState(
            count=jnp.zeros((), jnp.int32),
            factors=factors,
            weight=jnp.zeros((), jnp.float32),
            inverse=inverse,
            last_step=optax.tree.zeros_like(params),
            damping=jnp.asarray(initial_damping, jnp.float32),
            predicted_kl=jnp.zeros((), jnp.float32),
            accepted=jnp.zeros((), jnp.bool_),
            gradient_mismatch=jnp.zeros((), jnp.bool_),
        )

    def refreshed(state: KFACState, params: Any, data: Any, strength: Array) -> Any:
        """Sums of factors, their weight, and the inverse to use now."""
        batch, _, weights = data
        if state.factors is None:
            now = factor(params, batch, weights, state.count)
            return None, state.weight, now.inverse(strength, rule=rule, mesh=mesh), None

        def add(operands: Any) -> Any:
            factors, weight = operands
            now = factor(params, batch, weights, state.count)
            summed = jax.tree.map(lambda a, b: decay * a + b.astype(a.dtype), factors, now)
            usable = tree_is_finite(summed)  # one bad batch would stay in the averages for ever
            return tree_where(usable, (summed, decay * weight + 1), operands)

        # A branch that is always taken would cost copies of the factors.
        due = state.count % factor_period == 0 if factor_period > 1 else True
        factors, weight = conditionally(due, add, (state.factors, state.weight))

        def invert(last: Any) -> Any:
            total = jnp.where(weight > 0, weight, 1)
            mean = jax.tree.map(lambda x: x / total.astype(x.dtype), factors)
            inverse = mean.inverse(strength, rule=rule, mesh=mesh)
            return tree_where(tree_is_finite(inverse), inverse, last)

        due = True
        if inverse_period > 1:  # and after a rejected step, when damping has risen
            due = (state.count % inverse_period == 0) | ~state.accepted
        inverse = conditionally(due, invert, state.inverse)
        return factors, weight, inverse, inverse

    @compiled_when_eager
    def step(gradient: Any, state: KFACState, params: Any, data: Any) -> Any:
        batch, targets, weights = data
        strength = state.damping
        if damping is not None:
            value = damping(state.count) if callable(damping) else damping
            strength = jnp.asarray(value, jnp.float32)
        factors, weight, inverse, kept = refreshed(state, params, data, strength)
        exact = fisher(model_fn, head, params, batch, weights=weights)
        direction = inverse.mv(gradient)
        last = state.last_step if momentum else None
        damp = lambda v: jax.tree.map(lambda x: strength.astype(x.dtype) * x, v)
        chosen, curvature = best_of_plane(exact, damp, gradient, direction, last)
        slope, length = tree_vdot(gradient, chosen), jnp.ones(())
        if max_kl is not None:
            length = jnp.sqrt(jnp.minimum(1.0, 2 * max_kl / jnp.maximum(curvature, 1e-30)))
        record = Step(slope, curvature, strength * tree_vdot(chosen, chosen), length)
        scaled = lambda a: jax.tree.map(lambda x: (a * x).astype(x.dtype), chosen)
        descent = jnp.isfinite(curvature) & (slope > 0) & tree_is_finite(chosen)
        accepted, mismatch = descent, state.gradient_mismatch
        if adaptive:
            loss = lambda z: mean_nll(head, z, targets, weights, None)
            moved = lambda a: jax.tree.map(jnp.subtract, params, scaled(a))
            outcome = loss_outcome(
                record, loss(exact.output), lambda a: loss(model_fn(moved(a), batch))
            )
            accepted = descent & ~outcome.worse
            # A bad batch or a gradient of zero says nothing about damping.
            adapted = adapted_damping(strength, record, outcome, accepted)
            strength = jnp.where(descent, adapted, strength)
            differs = lambda: gradient_differs(exact, gradient, chosen, length, outcome, targets)
            mismatch = jax.lax.cond(descent & outcome.worse, differs, lambda: mismatch)
        chosen, predicted_kl = scaled(length), 0.5 * length**2 * curvature
        zeros = jax.tree.map(jnp.zeros_like, chosen)
        chosen = tree_where(accepted, chosen, zeros)
        return chosen, KFACState(
            count=optax.safe_increment(state.count),
            factors=factors,
            weight=weight,
            inverse=kept,
            last_step=jax.tree.map(lambda x, y: x.astype(y.dtype), chosen, state.last_step),
            damping=as_finite(strength.astype(jnp.float32)),
            predicted_kl=as_finite(jnp.where(accepted, predicted_kl, 0).astype(jnp.float32)),
            accepted=accepted,
            gradient_mismatch=mismatch,
        )

    def update(
        updates: Any,
        state: KFACState,
        params: Any = None,
        *,
        batch: Any = None,
        targets: Any = None,
        weights: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, KFACState]:
        del extra_args
        if params is None:
            raise ValueError("params: expected the parameters, got None; tx.update(g, s, params).")
        if batch is None:
            raise ValueError("batch: expected what model_fn reads, got None; pass batch=.")
        if adaptive and targets is None:
            raise ValueError("targets: damping=None adapts to the loss; pass targets= or a number.")
        gradient = check_like(updates, params, "updates", "params", cast=False)
        return step(gradient, state, params, (batch, targets, weights))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def conditionally(due: Array | bool, change: Callable[[Any], Any], value: Any) -> Any:
    """``change(value)`` where due, else ``value``."""
    return change(value) if due is True else jax.lax.cond(due, change, lambda value: value, value)
