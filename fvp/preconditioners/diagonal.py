"""Division by a power of a damped diagonal."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree
from fvp.curvature import CurvatureOperator, FisherCurvature, SampledCurvature
from fvp.layers.diagonal import diagonal_of
from fvp.numerics import wide_dtype, widen
from fvp.preconditioners.base import Preconditioner
from fvp.typing import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalPreconditioner:
    """v / scale, leaf by leaf."""

    scale: Any

    def mv(self, v: Any) -> Any:
        """The preconditioner times ``v``, in the dtypes of ``v``."""
        return jax.tree.map(lambda x, s: (widen(x) / s).astype(x.dtype), v, self.scale)


def diagonal_preconditioner(
    diagonal: Any, damping: ArrayLike, exponent: ArrayLike = 0.75
) -> DiagonalPreconditioner:
    """V / (diagonal + damping)^exponent.

    With the exact diagonal of the curvature and exponent 1 this is Jacobi's; Martens takes the sum
    of squared gradients and 0.75, which holds back where that is a poor guess.

    Args:
      diagonal: pytree like the parameters, entries of at least 0.
      damping: positive number, as in `fvp.cg`.
      exponent: 0.75 or 1.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> a = jnp.array([1.0, 10.0, 100.0])
      >>> M = fvp.diagonal_preconditioner(a, 0.0, exponent=1.0)
      >>> x, info = fvp.cg(lambda v: a * v, a, M=M)
      >>> print(x, info.iterations)
      [1. 1. 1.] 1

    Reference:
      J. Martens, Deep learning via Hessian-free optimization, 2010, section 4.7.
    """
    diagonal = check_inexact_tree(diagonal, "diagonal")
    return DiagonalPreconditioner(
        jax.tree.map(lambda d: (widen(d) + damping) ** exponent, diagonal)
    )


@dataclasses.dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Division by (diag F + damping)^exponent in the conjugate gradients of a transformation.

    Args:
      exponent: as in `diagonal_preconditioner`.
      num_samples: labels drawn for each example, for an estimate of the diagonal at the cost of
        that many backward passes; None takes the exact one, with one for each output.
      seed: of those draws, the same at each update.

    Examples:
      >>> import fvp
      >>> solver = fvp.CG(preconditioner=fvp.Jacobi(num_samples=None), refresh_period=20)
    """

    exponent: ArrayLike = 0.75
    num_samples: int | None = 1
    seed: int = 0

    def init(self, params: Params) -> Params:
        """Ones."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, wide_dtype(p.dtype)), params)

    def update(self, made: Params, operator: CurvatureOperator, damping: ArrayLike) -> Params:
        """The damped diagonal of the Fisher at the examples of ``operator``."""
        problem = operator.problem
        if problem is None or problem.axis_name is not None:
            raise ValueError("preconditioner: Jacobi takes neither chunk_size nor axis_name.")
        kind = FisherCurvature
        if self.num_samples is not None:
            keys = jax.random.split(jax.random.key(self.seed), self.num_samples)
            kind, problem = SampledCurvature, dataclasses.replace(problem, keys=keys)
        diagonal = diagonal_of(problem, kind)
        damped = lambda d, old: ((widen(d) + damping) ** self.exponent).astype(old.dtype)
        return jax.tree.map(damped, diagonal, made)

    def apply(self, made: Params, v: Params) -> Params:
        """``v`` over the damped diagonal."""
        return DiagonalPreconditioner(made).mv(v)
