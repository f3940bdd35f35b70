"""Damped solves in the space of examples x outputs (Woodbury)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_like, check_nonnegative
from fvp.compilation import compiled_when_eager
from fvp.curvature import CurvatureOperator
from fvp.factorization import SemidefiniteFactor
from fvp.layers.columns import check_not_negative
from fvp.mesh import row_axes
from fvp.numerics import cast_like, tree_axpy, widen_tree
from fvp.solvers.cg_iteration import CGInfo
from fvp.solvers.damped import DampedCurvature, DampedSolver, DampedSystem, Moment
from fvp.solvers.orthogonal import orthogonal_system, root_triangle
from fvp.solvers.rounding import (
    ROUNDING,
    above_noise,
    above_rounding,
    above_rounding_of_root,
    holds_digits,
)
from fvp.solvers.whitened_jacobian import WhitenedJacobian
from fvp.typing import Params, PyTree


def solve_dual(
    operator: CurvatureOperator, rhs: Any, damping: ArrayLike, *, targets: Any = None
) -> Any:
    r"""Solves (F + damping I) x = rhs exactly, through a matrix of examples x outputs.

    With F = A^T A, one row of A for each example and column of S, S S^T = F_R, and any w,

        x = A^T (A A^T + damping I)^-1 w + r / damping - A^T (A A^T + damping I)^-1 A r / damping,

    r = rhs - A^T w. With w = (A A^T + damping I)^-1 A rhs, r is what F does not reach, and little
    else. Only that is divided by the damping, with the rounding of rhs, so that 1e-7 of it in
    float32 is seen where the damping is that small. Refined once by the operator's product.

    A A^T comes from products of the inputs and cotangents of each layer (`fvp.layers`), never from
    one backward pass per row; only parameters whose use has no layer rule take that. The cost is
    that of the (rows, rows) matrix and its Cholesky factorisation: choose it where rows = examples
    x outputs are fewer than the parameters, a few thousand at most. Differentiable in ``operator``,
    ``rhs`` and ``damping``, forward and reverse.

    Args:
      operator: from `fvp.fisher`, `fvp.ggn`, `fvp.empirical_fisher` or
        `fvp.mc_fisher`, without ``chunk_size`` and ``axis_name``.
      rhs: pytree like the parameters.
      damping: positive number or scalar array; a vector of them solves for each, on a leading axis
        of the result, at little more than the cost of one.
      targets: the labels whose gradient ``rhs`` is. It then enters as A^T w, x = A^T (A A^T +
        damping I)^-1 w, which keeps its digits however small the damping; ``rhs`` may still hold
        more than that gradient.

    Returns:
      x, a pytree like ``rhs``.

    Raises:
      TypeError: for an operator that is not a sum of outer products, such as the Hessian.
      ValueError: for a chunked operator, a damping that is not positive, or examples sharded over
        Explicit mesh axes.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[3.0, 4.0]])
      >>> F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print(fvp.solve_dual(F, jnp.array([[3.0], [4.0]]), 25.0))  # rhs / (25 + 25)
      [[0.06]
       [0.08]]

    Reference:
      Y. Ren, D. Goldfarb, Efficient subsampled Gauss-Newton and natural gradient methods for
      training neural networks, 2019; A. Chen, M. Heyl, minSR, 2024.
    """
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(f"operator: expected one such as fvp.fisher(...), got {operator!r}.")
    if (reason := no_dual(operator)) is not None:
        raise reason
    check_nonnegative(damping, "damping")
    if isinstance(damping, (int, float)) and damping == 0:
        raise ValueError("damping: solve_dual expects a positive number, got 0.")
    assert operator.problem is not None
    check_not_negative(operator.problem.weights)
    rhs = check_like(rhs, operator.like, "rhs", "params", cast=False)
    return _solve(operator, rhs, jnp.asarray(damping), targets)


def no_dual(operator: CurvatureOperator) -> Exception | None:
    """Why the dual solve does not take ``operator``; None where it does."""
    if operator.axis_name is not None:
        return ValueError("operator: solve_dual expects one built without axis_name.")
    if operator.problem is None:
        return ValueError("operator: solve_dual expects one built without chunk_size.")
    if operator.linearized.root() is None:
        return TypeError(
            "operator: solve_dual expects a Fisher or GGN whose square root in z is known, and none"
            f" is known for {operator.linearized}. Take fvp.fisher(...), or fvp.cg."
        )
    if row_axes(operator.linearized.output) is not None:
        return ValueError(
            "operator: its examples are sharded over Explicit mesh axes, which solve_dual regroups;"
            " build and solve inside jax.sharding.auto_axes."
        )
    return None


@compiled_when_eager
def _solve(operator: CurvatureOperator, rhs: Params, damping: Array, targets: Any) -> Params:
    jacobian = WhitenedJacobian.of(operator)
    gram = jacobian.gram()
    at = lambda damping: DualFactor.of(jacobian, gram, damping).solve(rhs, targets)
    return jax.lax.map(at, damping) if damping.ndim else at(damping)


@dataclasses.dataclass(frozen=True)
class DualFactor:
    """F + damping I, factorised in the space of examples x outputs; lives inside one trace."""

    jacobian: WhitenedJacobian
    gram: Array  # A A^T
    factor: SemidefiniteFactor
    damping: Array
    least: Array | float = 0.0  # of the damping of what is no gradient at the targets

    @classmethod
    def of(cls, jacobian: WhitenedJacobian, gram: Array, damping: Array) -> DualFactor:
        """From A and A A^T."""
        damping = damping.astype(gram.dtype)
        return cls(jacobian, gram, SemidefiniteFactor.of(gram, damping), damping)

    def solve(self, rhs: Params, targets: Any = None) -> Params:
        """The x for ``rhs``, the gradient at ``targets`` and maybe more; see `solve_dual`."""
        wide = widen_tree(rhs)
        w = self.jacobian.coefficients(targets)
        if w is None:
            x = self._solve(wide)
            # Refined once, by the products of the operator, which may hold digits that A does not.
            operator = self.jacobian.operator
            product = widen_tree(operator.mv(cast_like(x, operator.like)))
            residual = tree_axpy(-1, product, tree_axpy(-self.damping, x, wide))
            return cast_like(tree_axpy(1, self._solve(residual), x), rhs)
        # What is left by rounding is not divided by the damping.
        rest = above_noise(tree_axpy(-1, self.jacobian.transposed(w), wide), wide)
        enough = self._enough()
        inner = self._inner(w) - enough._inner(self.jacobian.times(rest)) / enough.damping
        x = jax.tree.map(lambda x: x / enough.damping.astype(x.dtype), rest)
        return cast_like(tree_axpy(1, self.jacobian.transposed(inner), x), rhs)

    def solve_outputs(self, u: Array) -> Params:
        """(F + damping I)^-1 J^T H_L u for a change ``u`` of the outputs, without cancellation."""
        return self.jacobian.transposed(self._inner(self.jacobian.images(u)))

    def _enough(self) -> DualFactor:
        """The same with at least ``least`` damping."""
        if isinstance(self.least, float):
            return self
        damping = jnp.maximum(self.damping, self.least)
        again = lambda: SemidefiniteFactor.of(self.gram, damping)
        factor = jax.lax.cond(self.damping < self.least, again, lambda: self.factor)
        return dataclasses.replace(self, factor=factor, damping=damping)

    def _inner(self, w: Array) -> Array:
        """(A A^T + damping I)^-1 w."""
        return self.factor.solve(w.reshape(-1, 1)).reshape(w.shape)

    def _solve(self, b: Params) -> Params:
        """What F reaches is told by outputs, but for little: only the rest meets the damping."""
        w = self._inner(self.jacobian.times(b))
        rest = tree_axpy(-1, self.jacobian.transposed(w), b)
        inner = self._inner(w) - self._inner(self.jacobian.times(rest)) / self.damping
        x = jax.tree.map(lambda x: x / self.damping.astype(x.dtype), rest)
        return tree_axpy(1, self.jacobian.transposed(inner), x)


@dataclasses.dataclass(frozen=True)
class Dual(DampedSolver):
    """F + damping I through the matrix of examples x outputs: exact, see `fvp.solve_dual`.

    Damping and l2 are at least sqrt(eps) trace(F), as in `fvp.Dense`; with targets, whose
    gradient needs no difference, only the rounding of the factorisation itself, 8 eps trace(F).

    Args:
      qr: as in `fvp.Dense`, where every use of a parameter has a layer rule and examples do not
        meet; weights are expected to be 0 or more. The rows that the factorisation reads cost
        several times what A A^T does by layers, unless parameters are used more than once, as in
        differential equations: worth it for the last digits.
    """

    direct: ClassVar[bool] = True

    qr: bool = False

    def prepare(
        self, damped: DampedCurvature, moment: Moment, state: PyTree
    ) -> tuple[DampedSystem, PyTree]:
        """Makes and factorises the matrix."""
        if (reason := no_dual(damped.operator)) is not None:
            raise reason
        jacobian = WhitenedJacobian.of(damped.operator)
        coefficients = jacobian.coefficients(moment.targets)
        by_rows = self.qr and jacobian.has_rows() and holds_digits(damped.operator)
        if by_rows and coefficients is not None and jacobian.gram_forms_rows():
            return orthogonal_system(damped, jacobian, coefficients, moment.norm), state
        gram = jacobian.gram()
        trace, eps = jnp.trace(gram), float(jnp.finfo(gram.dtype).eps)
        known = coefficients is not None
        if by_rows and known:
            damped, total, least = above_rounding_of_root(damped, trace, moment.norm)
            lower = root_triangle(lambda: gram, lambda: jacobian.rows().T, total, least)
            factor = SemidefiniteFactor.of_triangle(lower.T)
            factor = DualFactor(jacobian, gram, factor, total, least)
        else:
            level = ROUNDING * eps if known else eps**0.5
            damped, total = above_rounding(damped, level * trace, moment.norm)
            factor = DualFactor.of(jacobian, gram, total)
        return DualSystem(damped, factor, moment.targets), state


@dataclasses.dataclass(frozen=True)
class DualSystem(DampedSystem):
    """The factorised matrix of examples x outputs."""

    direct: ClassVar[bool] = True

    damped: DampedCurvature
    factor: DualFactor
    targets: Any

    def solve(self, rhs: Params, start: Params | None) -> tuple[Params, CGInfo]:
        """By the factor; ``start`` is not needed."""
        del start
        x = self.factor.solve(rhs, self.targets)
        return x, self.damped.record(x, rhs)

    def solve_outputs(self, u: Array) -> Params:
        """Without cancellation."""
        return self.factor.solve_outputs(u)
