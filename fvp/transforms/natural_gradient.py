"""Optax transformations: a damped solve with the curvature of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_like
from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator, empirical_fisher, fisher, ggn
from fvp.curvature.operators import ModelFn
from fvp.heads import Head
from fvp.mesh import AxisName
from fvp.numerics import cast_like, tree_where
from fvp.solvers import SOLVERS, cg, choose_solver, solve_exactly

ScalarOrSchedule = ArrayLike | Callable[[Array], ArrayLike]

_CURVATURES = {"fisher": fisher, "ggn": ggn, "empirical": empirical_fisher}


class NaturalGradientState(NamedTuple):
    """State of :func:`scale_by_fisher` and :func:`natural_gradient`."""

    count: Any  # int32 scalar, updates done
    direction: Any  # like the parameters, the last solution, where the next solve starts; or None
    damping: Array  # float32 scalar, of the last step
    iterations: Array  # int32 scalar, CG iterations of the last step
    residual_norm: Array  # float32 scalar, of the last solve
    predicted_kl: Array  # float32 scalar, 1/2 d^T (curvature) d for the last step d
    accepted: Array  # bool scalar; a step that was not is zeros


def scale_by_fisher(
    model_fn: ModelFn,
    head: Head,
    *,
    damping: ScalarOrSchedule = 0.1,
    curvature: str = "fisher",
    solver: str = "cg",
    maxiter: Any = 20,
    tol: ArrayLike = 1e-3,
    warm_start: bool = False,
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

    Other keywords are ignored. Where the gradient or the solution is not finite, or no descent was
    found, the update is zero, the warm start is kept and ``accepted`` in the state is False.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      damping: multiple of the identity added to the curvature: a number or an optax schedule.
      curvature: "fisher", "ggn" or "empirical".
      solver: "cg"; "dual", an exact solve in the space of examples x outputs
        (:func:`fvp.solve_dual`; pass ``targets=`` to keep its digits at tiny damping); "dense", an
        exact solve with the (P, P) matrix; or "auto", which takes "dual" where examples x outputs
        are at most 4096 and fewer than the parameters, "dense" where the parameters are at most
        1024, and else "cg".
      maxiter: most CG iterations.
      tol: CG stops at this relative residual.
      warm_start: start CG at the last solution; costs one product.
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
        chunk_size=chunk_size,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )


def natural_gradient(
    learning_rate: ScalarOrSchedule,
    model_fn: ModelFn,
    head: Head,
    *,
    damping: ScalarOrSchedule = 0.1,
    curvature: str = "fisher",
    solver: str = "cg",
    maxiter: Any = 20,
    tol: ArrayLike = 1e-3,
    warm_start: bool = False,
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
        chunk_size=chunk_size,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )


def _transform(
    learning_rate: ScalarOrSchedule | None,
    model_fn: ModelFn,
    head: Head,
    *,
    damping: ScalarOrSchedule,
    curvature: str,
    solver: str,
    maxiter: Any,
    tol: ArrayLike,
    warm_start: bool,
    chunk_size: int | None,
    batch_axes: Any,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """Both transformations: the step is the direction itself, or -learning_rate times it."""
    if curvature not in _CURVATURES:
        raise ValueError(f"curvature: expected one of {sorted(_CURVATURES)}, got {curvature!r}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {SOLVERS}, got {solver!r}.")
    if isinstance(damping, (int, float)) and not damping >= 0:
        raise ValueError(f"damping: expected 0 or more, got {damping}.")
    model_on_subset = _OnSubset(model_fn)

    def init(params: Any) -> NaturalGradientState:
        # One array for each field: a buffer that stands in two places cannot be donated.
        return NaturalGradientState(
            count=jnp.zeros((), jnp.int32),
            direction=optax.tree.zeros_like(params) if warm_start else None,
            damping=jnp.zeros((), jnp.float32),
            iterations=jnp.zeros((), jnp.int32),
            residual_norm=jnp.zeros((), jnp.float32),
            predicted_kl=jnp.zeros((), jnp.float32),
            accepted=jnp.zeros((), jnp.bool_),
        )

    def build(params: Any, batch: Any, targets: Any, weights: Any, all_params: Any) -> Any:
        model, axes = model_fn, batch_axes
        if _has_masked_nodes(params):
            model, axes, batch = model_on_subset, (axes, None), (batch, all_params)
        labels = () if curvature == "fisher" else (targets,)
        return _CURVATURES[curvature](
            model,
            head,
            params,
            batch,
            *labels,
            weights=weights,
            chunk_size=chunk_size,
            batch_axes=axes,
            axis_name=axis_name,
        )

    @compiled_when_eager
    def step(gradient: Any, state: NaturalGradientState, params: Any, operator: Any, data: Any):
        if operator is None:
            operator = build(params, *data)
        strength = _at(damping, state.count)
        chosen = choose_solver(operator) if solver == "auto" else solver
        if chosen == "cg":
            solution, info = cg(
                operator, gradient, damping=strength, x0=state.direction, tol=tol, maxiter=maxiter
            )
        else:
            targets = data[1]
            solution, info = solve_exactly(
                chosen, operator, gradient, jnp.asarray(strength), targets
            )
        # A solve that broke down late still holds a good iterate; one that did not descend, or
        # met something that is not finite, leaves parameters and warm start alone.
        accepted = jnp.isfinite(info.residual_norm) & (info.model_value < 0)
        for leaf in jax.tree.leaves(solution):
            accepted &= jnp.all(jnp.isfinite(leaf))
        factor = 1.0 if learning_rate is None else -jnp.asarray(_at(learning_rate, state.count))
        update = jax.tree.map(
            lambda x: jnp.where(accepted, factor * x, 0).astype(x.dtype), solution
        )
        direction = state.direction
        if direction is not None:
            direction = tree_where(accepted, cast_like(solution, direction), direction)
        kl = jnp.maximum(0.5 * jnp.square(factor) * info.curvature, 0)  # never below by rounding
        state = NaturalGradientState(
            count=optax.safe_increment(state.count),
            direction=direction,
            damping=jnp.asarray(strength, jnp.float32),
            iterations=info.iterations,
            residual_norm=info.residual_norm.astype(jnp.float32),
            predicted_kl=jnp.where(accepted, kl, 0).astype(jnp.float32),
            accepted=accepted,
        )
        return update, state

    def update(
        updates: Any,
        state: NaturalGradientState,
        params: Any = None,
        *,
        batch: Any = None,
        targets: Any = None,
        weights: Any = None,
        operator: CurvatureOperator | None = None,
        all_params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, NaturalGradientState]:
        del extra_args
        if params is None:
            raise ValueError("params: expected the parameters, got None; tx.update(g, s, params).")
        if operator is None:
            _check_data(params, batch, targets, all_params, curvature)
        gradient = check_like(updates, params, "updates", "params", cast=False)
        return step(gradient, state, params, operator, (batch, targets, weights, all_params))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _at(value: ScalarOrSchedule, count: Any) -> ArrayLike:
    return value(count) if callable(value) else value


class _OnSubset:
    """``model_fn`` as a function of the unmasked leaves alone; hashes like the model function."""

    def __init__(self, model_fn: ModelFn) -> None:
        self._model_fn = model_fn

    def __call__(self, params: Any, batch: Any) -> Any:
        batch, all_params = batch
        whole = jax.tree.map(
            lambda leaf, full: full if isinstance(leaf, optax.MaskedNode) else leaf,
            params,
            all_params,
            is_leaf=_is_masked_node,
        )
        return self._model_fn(whole, batch)


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _has_masked_nodes(params: Any) -> bool:
    return any(_is_masked_node(x) for x in jax.tree.leaves(params, is_leaf=_is_masked_node))


def _check_data(params: Any, batch: Any, targets: Any, all_params: Any, curvature: str) -> None:
    if batch is None:
        raise ValueError(
            "batch: expected what model_fn reads, got None; call tx.update(grads, state, params,"
            " batch=batch). Some optax wrappers do not forward extra arguments: in a chain, wrap"
            " MultiSteps as optax.GradientTransformationExtraArgs(ms.init, ms.update)."
        )
    if targets is None and curvature != "fisher":
        raise ValueError(f"targets: curvature={curvature!r} expects targets=, got None.")
    if all_params is None and _has_masked_nodes(params):
        raise ValueError(
            "all_params: optax.masked and optax.partition hide part of the parameters that model_fn"
            " needs; pass the whole tree as tx.update(grads, state, params, batch=batch,"
            " all_params=params)."
        )
