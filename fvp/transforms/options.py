"""What the constructors of the transformations and their ``update`` take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_nonnegative
from fvp.control import LevenbergMarquardt
from fvp.control.fixed import FixedDamping
from fvp.curvature import empirical_fisher, fisher, ggn
from fvp.heads import Head
from fvp.mesh import AxisName
from fvp.transforms.subset import OnSubset, has_masked_nodes

CURVATURES = {"fisher": fisher, "ggn": ggn, "empirical": empirical_fisher}
ADAPTIVE = "adaptive"  # the momentum that nobody set, under adaptive damping


@dataclasses.dataclass(frozen=True)
class Options:
    """What the constructors of the transformations take, checked."""

    model_fn: Callable[[Any, Any], Array]
    head: Head
    learning_rate: Any
    rule: FixedDamping | LevenbergMarquardt
    curvature: str
    solver: str
    exact_only: bool  # nobody set a damping, and without one CG would not end
    maxiter: Any  # None where the budget adapts
    tol: ArrayLike
    warm_start: bool
    momentum: Any  # a number or a schedule, "quadratic", ADAPTIVE, or None
    max_kl: Any
    constant_kl: bool
    l2: Any
    line_search: str | None
    geodesic: bool
    chunk_size: int | None
    batch_axes: Any
    axis_name: AxisName
    on_subset: OnSubset  # model_fn on part of the parameters: one object, one compilation

    @property
    def adaptive(self) -> bool:
        """Whether steps are tried and damping follows."""
        return isinstance(self.rule, LevenbergMarquardt)

    @property
    def adapts_budget(self) -> bool:
        """Whether the iterations of CG follow progress."""
        return self.adaptive and self.maxiter is None

    @property
    def tries(self) -> bool:
        """Whether a step is tried before it is returned."""
        return self.adaptive or self.line_search is not None

    @property
    def spring(self) -> bool:
        """Whether the last direction enters the right-hand side."""
        return self.momentum is not None and not self.plane

    @property
    def plane(self) -> bool:
        """Whether the step is the best of the plane of the new direction and the last step."""
        return isinstance(self.momentum, str) and self.momentum == "quadratic"

    @property
    def keeps_direction(self) -> bool:
        """Whether the next step reads the direction of this one."""
        return self.warm_start or self.adaptive or self.momentum is not None


class Data(NamedTuple):
    """The keywords of ``update`` that say what the loss is."""

    batch: Any
    targets: Any
    weights: Any
    all_params: Any
    loss_before: Any
    value_fn: Any

    @property
    def has_loss(self) -> bool:
        """Whether a step can be tried on the loss."""
        return self.batch is not None and (self.targets is not None or self.value_fn is not None)

    @property
    def tries_nll(self) -> bool:
        """Whether that loss is the head's mean nll."""
        return self.has_loss and self.value_fn is None


def check_numbers(numbers: dict[str, Any], damping: Any) -> None:
    """Raises where a number is known not to be one, or damping is none of its forms."""
    for name, value in numbers.items():
        if value is not None:
            check_nonnegative(value, name)
    if isinstance(damping, type):
        raise TypeError(f"damping: expected an instance, {damping.__name__}(), got the class.")
    if damping is not None and not isinstance(damping, LevenbergMarquardt):
        expected = "; or a schedule, or an adaptive rule such as fvp.LevenbergMarquardt()"
        check_nonnegative(damping, "damping", expected)


def check_data(params: Any, batch: Any, targets: Any, all_params: Any, curvature: str) -> None:
    """Raises where ``update`` lacks something that the curvature needs."""
    if batch is None:
        raise ValueError(
            "batch: expected what model_fn reads, got None; call tx.update(grads, state, params,"
            " batch=batch). Some optax wrappers do not forward extra arguments: in a chain, wrap"
            " MultiSteps as optax.GradientTransformationExtraArgs(ms.init, ms.update)."
        )
    if targets is None and curvature != "fisher":
        raise ValueError(f"targets: curvature={curvature!r} expects targets=, got None.")
    if all_params is None and has_masked_nodes(params):
        raise ValueError(
            "all_params: optax.masked and optax.partition hide part of the parameters that model_fn"
            " needs; pass the whole tree as tx.update(grads, state, params, batch=batch,"
            " all_params=params)."
        )
