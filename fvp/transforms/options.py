"""What the constructors of the transformations take, checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from fvp.checks import check_nonnegative
from fvp.control import DampingRule, FixedDamping
from fvp.curvature import (
    EmpiricalCurvature,
    FisherCurvature,
    HessianCurvature,
    OutputCurvature,
)
from fvp.curvature.output_curvature import check_output_curvature
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.mesh import AxisName
from fvp.solvers import CG, Auto, DampedSolver, Dense, Dual
from fvp.transforms.objective import Data
from fvp.transforms.subset import OnSubset, has_masked_nodes
from fvp.typing import ModelFn, Params

CURVATURES: dict[str, type[OutputCurvature]] = {
    "fisher": FisherCurvature,
    "ggn": HessianCurvature,
    "empirical": EmpiricalCurvature,
}
OF_RULE = "of the rule"  # the momentum that nobody set, under an adaptive rule


@dataclasses.dataclass(frozen=True)
class Options:
    """Of one transformation.

    Attributes:
      on_subset: ``model_fn`` on part of the parameters: one object, one compilation.
      learning_rate: None where the direction itself is returned.
      default_rule: whether the damping was left to the library.
      momentum: a number or a schedule, "quadratic", OF_RULE, or None.
      line_search: "loss", "outputs" or None.
    """

    model_fn: ModelFn
    on_subset: OnSubset
    head: Head
    learning_rate: Any
    rule: DampingRule
    default_rule: bool
    curvature: type[OutputCurvature]
    solver: DampedSolver
    momentum: Any
    max_kl: Any
    constant_kl: bool
    l2: Any
    line_search: str | None
    geodesic: bool
    chunk_size: int | None
    batch_axes: Any
    axis_name: AxisName

    def rate(self, count: Array) -> Array:
        """How far along the direction, at the step ``count``."""
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        return jnp.asarray(rate(count) if callable(rate) else rate)

    @property
    def sign(self) -> float:
        """Of the update that is returned."""
        return 1.0 if self.learning_rate is None else -1.0

    @property
    def tries(self) -> bool:
        """Whether a step is tried before it is returned."""
        return self.rule.adapts or self.line_search is not None

    @property
    def minds_noise(self) -> bool:
        """Whether steps change where the noise of the batches leads: nothing set forbids it."""
        bounded = self.max_kl is not None or self.line_search is not None
        return self.default_rule and self.rule.adapts and not (bounded or self.geodesic)

    @property
    def plane(self) -> bool:
        """Whether the step is the best of the plane of the new direction and the last step."""
        return isinstance(self.momentum, str) and self.momentum == "quadratic"

    @property
    def keeps_direction(self) -> bool:
        """Whether the next step reads the direction of this one."""
        return self.solver.warm_start or self.rule.adapts or self.momentum is not None


def checked_options(
    learning_rate: Any,
    model_fn: ModelFn,
    head: Head,
    *,
    damping: Any,
    default_rule: DampingRule,
    curvature: Any,
    solver: DampedSolver,
    momentum: Any,
    max_kl: Any,
    constant_kl: bool,
    line_search: str | None,
    **others: Any,
) -> Options:
    """Raises where the options can't be; ``default_rule`` stands for a damping of None."""
    if others["l2"] is not None:
        check_nonnegative(others["l2"], "l2")
    if line_search not in (None, "loss", "outputs"):
        raise ValueError(f'line_search: expected "loss" or "outputs", got {line_search!r}.')
    if max_kl is None and constant_kl:
        raise ValueError("max_kl: constant_kl=True expects the length of the step, got None.")
    if isinstance(max_kl, (int, float)) and not 0 < max_kl < math.inf:
        raise ValueError(f"max_kl: expected a positive number of nats, got {max_kl}.")
    rule = default_rule if damping is None else damping_rule(damping)
    return Options(
        model_fn=model_fn,
        on_subset=OnSubset(model_fn),
        head=head,
        learning_rate=learning_rate,
        rule=rule,
        default_rule=damping is None,
        curvature=_curvature(curvature),
        solver=solver,
        momentum=_momentum(momentum, rule, solver),
        max_kl=max_kl,
        constant_kl=constant_kl,
        line_search=line_search,
        **others,
    )


def check_order(name: str, learning_rate: Any, model_fn: Any, head: Any) -> None:
    """Raises unless each of the first arguments of ``name`` can be what its place says."""
    order = "model_fn, head" if learning_rate is None else "learning_rate, model_fn, head"
    hint = f"; the order is fvp.{name}({order})"
    if isinstance(model_fn, Head) or not callable(model_fn):
        raise TypeError(f"model_fn: expected model_fn(params, batch) -> z, got {model_fn!r}{hint}.")
    check_head(head, hint)
    if isinstance(learning_rate, Head):
        raise TypeError(f"learning_rate: expected a number or a schedule, got a head{hint}.")
    # It may be negative, to climb.
    if isinstance(learning_rate, (int, float)) and not math.isfinite(learning_rate):
        raise ValueError(f"learning_rate: expected a finite number, got {learning_rate}.")


def damping_rule(damping: Any) -> DampingRule:
    """The rule that ``damping`` is, or that gives this number or schedule."""
    if isinstance(damping, DampingRule):
        return damping
    if isinstance(damping, type):
        raise TypeError(f"damping: expected an instance, {damping.__name__}(), got the class.")
    expected = "; or a schedule, or an adaptive rule such as fvp.LevenbergMarquardt()"
    check_nonnegative(damping, "damping", expected)
    return FixedDamping(damping)


def damped_solver(solver: Any, maxiter: Any, tol: Any, warm_start: bool) -> DampedSolver:
    """The solver that ``solver`` is, or is the short name of; the others are those of CG."""
    if isinstance(solver, DampedSolver):
        if maxiter is not None or tol is not None or warm_start:
            raise ValueError(
                "solver: maxiter, tol and warm_start are of the solver itself, such as"
                " fvp.CG(maxiter=20), where that is an object."
            )
        return solver
    cg = CG(maxiter=maxiter, tol=0.01 if tol is None else tol, warm_start=warm_start)
    named = {"auto": Auto(cg), "cg": cg, "dense": Dense(), "dual": Dual()}
    if not isinstance(solver, str) or solver not in named:
        raise ValueError(
            f"solver: expected one of {tuple(named)} or a fvp.DampedSolver, got {solver!r}."
        )
    return named[solver]


def _curvature(curvature: Any) -> type[OutputCurvature]:
    if not isinstance(curvature, str):
        check_output_curvature(curvature, "curvature")
        return curvature
    if curvature not in CURVATURES:
        raise ValueError(
            f"curvature: expected one of {sorted(CURVATURES)} or a subclass of"
            f" fvp.OutputCurvature, got {curvature!r}."
        )
    return CURVATURES[curvature]


def _momentum(momentum: Any, rule: DampingRule, solver: DampedSolver) -> Any:
    if isinstance(momentum, str) and momentum != "quadratic":
        raise ValueError(f'momentum: expected a number or "quadratic", got {momentum!r}.')
    number = isinstance(momentum, (int, float))
    if number and not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}.")
    if number and momentum == 0:
        return None
    if solver.approximate and not (momentum is None or isinstance(momentum, str)):
        raise ValueError(
            'momentum: expected "quadratic" or None where the solver gives a direction only, as'
            f" {type(solver).__name__} does, got {momentum!r}."
        )
    if momentum is None and rule.adapts and not solver.approximate:
        return OF_RULE
    return momentum


def check_data(params: Params, data: Data, curvature: type[OutputCurvature]) -> None:
    """Raises where ``update`` lacks something that the curvature needs."""
    if data.batch is None:
        raise ValueError(
            "batch: expected what model_fn reads, got None; call tx.update(grads, state, params,"
            " batch=batch), with () where it reads nothing. Some optax wrappers do not forward"
            " extra arguments: in a chain, wrap MultiSteps as"
            " optax.GradientTransformationExtraArgs(ms.init, ms.update)."
        )
    if data.targets is None and curvature.reads_targets:
        names = {kind: repr(name) for name, kind in CURVATURES.items()}
        name = names.get(curvature, curvature.__name__)
        raise ValueError(f"targets: curvature={name} expects targets=, got None.")
    if data.all_params is None and has_masked_nodes(params):
        raise ValueError(
            "all_params: optax.masked and optax.partition hide part of the parameters that model_fn"
            " needs; pass the whole tree as tx.update(grads, state, params, batch=batch,"
            " all_params=params)."
        )
