"""Division by a power of a damped diagonal."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree
from fvp.numerics import widen


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
      damping: positive number, as in :func:`fvp.cg`.
      exponent: 0.75 or 1.

    Example:
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
