"""Kronecker factors as the solver of the transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from fvp.checks import check_nonnegative, check_positive_int
from fvp.curvature import FisherCurvature, Problem, SampledCurvature
from fvp.layers import KFAC, KFACInverse
from fvp.layers.kfac import check_weight_sharing, kfac_of
from fvp.layers.kronecker import check_damping_rule
from fvp.numerics import cast_like, computed_once, tree_is_finite, tree_where, zeros_of
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSolver, DampedSystem, Moment, Setting
from fvp.tracing.coverage import check_fallback
from fvp.typing import Params

INVERSE_PERIOD = 5  # steps, where factors are kept between them; docs/decisions/solvers.md


class KFACState(NamedTuple):
    """What `KFACSolver` keeps between steps; all but the weight None without a batch."""

    factors: Any  # KFAC, weighted sums of the factors so far
    weight: Array  # float32 scalar, the weight of those sums
    inverse: Any  # KFACInverse in use


@dataclasses.dataclass(frozen=True)
class KFACSolver(DampedSolver):
    """The damped inverse of the Kronecker-factored Fisher: a direction for a few passes.

    Args:
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
      fallback: see `fvp.kfac`.
      mesh: the devices among which inversions are shared, see `fvp.KFAC.inverse`.

    Examples:
      >>> import fvp
      >>> solver = fvp.KFACSolver(num_samples=None)
      >>> tx = fvp.scale_by_fisher(lambda w, x: x @ w, fvp.Gaussian(), damping=0.1, solver=solver)
    """

    approximate: ClassVar[bool] = True

    example_batch: Any = None
    decay: float = 0.95
    factor_period: int = 1
    inverse_period: int | None = None
    rule: str = "pi"
    weight_sharing: str = "expand"
    num_samples: int | None = 1
    seed: int = 0
    fallback: str | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        check_nonnegative(self.decay, "decay")
        check_positive_int(self.factor_period, "factor_period")
        if self.inverse_period is not None:
            check_positive_int(self.inverse_period, "inverse_period")
        if self.num_samples is not None:
            check_positive_int(self.num_samples, "num_samples")
        check_damping_rule(self.rule)
        check_weight_sharing(self.weight_sharing)
        check_fallback(self.fallback)
        if self.example_batch is None and (self.factor_period > 1 or self._inverse_period > 1):
            raise ValueError(
                "example_batch: factor_period and inverse_period keep factors between steps, and"
                " init must know their shapes; pass a batch, or jax.ShapeDtypeStructs like one."
            )

    @property
    def _inverse_period(self) -> int:
        if self.inverse_period is not None:
            return self.inverse_period
        return 1 if self.example_batch is None else INVERSE_PERIOD

    def init(self, setting: Setting) -> KFACState:
        """Zeros, of the shapes that the example batch tells."""
        factors = inverse = None
        if self.example_batch is not None:
            make = lambda params, batch: self._factors(setting.problem(params, batch), 0)
            shapes = jax.eval_shape(make, setting.params, self.example_batch)
            inverted = jax.eval_shape(lambda k: k.inverse(jnp.float32(1), rule=self.rule), shapes)
            factors, inverse = zeros_of(shapes), zeros_of(inverted)
        return KFACState(factors, jnp.zeros((), jnp.float32), inverse)

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: KFACState
    ) -> tuple[DampedSystem, KFACState]:
        """Adds the factors of this batch to the averages, and inverts them when it is due."""
        problem = damped.operator.problem
        if problem is None or problem.axis_name is not None:
            raise ValueError("solver: KFACSolver takes neither chunk_size nor axis_name.")
        make = lambda: self._factors(problem, moment.count)
        shift = damped.damping if damped.l2 is None else damped.damping + damped.l2
        damping = jnp.asarray(shift, jnp.float32)
        if state.factors is None:
            inverse = make().inverse(damping, rule=self.rule, mesh=self.mesh)
            return KFACSystem(damped, inverse), state
        # A branch that is always taken would cost copies of the factors.
        due = moment.count % self.factor_period == 0 if self.factor_period > 1 else True
        add = lambda sums: self._added(make(), sums)
        factors, weight = conditionally(due, add, (state.factors, state.weight))
        due = True
        if self._inverse_period > 1:  # and after a rejected step, when damping has risen
            due = (moment.count % self._inverse_period == 0) | moment.failed
        invert = lambda last: self._inverted(factors, weight, damping, last)
        inverse = conditionally(due, invert, state.inverse)
        return KFACSystem(damped, inverse), KFACState(factors, weight, inverse)

    def _factors(self, problem: Problem, count: Any) -> KFAC:
        """The factors of one batch."""
        kind = FisherCurvature
        if self.num_samples is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), count)
            keys = jax.random.split(key, self.num_samples)
            kind, problem = SampledCurvature, dataclasses.replace(problem, keys=keys)
        return kfac_of(
            problem,
            kind,
            weight_sharing=self.weight_sharing,
            eigenvalue_corrected=False,
            fallback=self.fallback,
        )

    def _added(self, now: KFAC, sums: Any) -> Any:
        """The decayed sums with one more batch."""
        factors, weight = sums
        summed = jax.tree.map(lambda a, b: self.decay * a + b.astype(a.dtype), factors, now)
        usable = tree_is_finite(summed)  # one bad batch would stay in the averages for ever
        return tree_where(usable, (summed, self.decay * weight + 1), sums)

    def _inverted(self, factors: KFAC, weight: Array, damping: Array, last: KFACInverse) -> Any:
        """The inverse of the averages; the last one where it is not finite."""
        total = computed_once(jnp.where(weight > 0, weight, 1))
        mean = jax.tree.map(lambda x: x / total.astype(x.dtype), factors)
        inverse = mean.inverse(damping, rule=self.rule, mesh=self.mesh)
        return tree_where(tree_is_finite(inverse), inverse, last)


@dataclasses.dataclass(frozen=True)
class KFACSystem(DampedSystem):
    """The damped inverse of the factors, in place of that of the curvature."""

    damped: DampedCurvature
    inverse: KFACInverse

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """A direction; its record says only whether it is finite."""
        del start
        x = cast_like(self.inverse.mv(rhs), rhs)
        finite, zero = tree_is_finite(x), jnp.zeros((), jnp.float32)
        count = jnp.zeros((), jnp.int32)
        return x, CGInfo(count, zero, finite, ~finite, zero, zero, zero)


def conditionally(due: Array | bool, change: Callable[[Any], Any], value: Any) -> Any:
    """``change(value)`` where due, else ``value``."""
    return change(value) if due is True else jax.lax.cond(due, change, lambda value: value, value)
