"""How far two curvatures are apart, and the steps that they lead to."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_nonnegative
from fvp.estimation.compiled import compiled_for_operators
from fvp.estimation.trace import trace
from fvp.numerics import power_of_two, tree_vdot
from fvp.raveled import Raveled
from fvp.records import Record
from fvp.solvers.conjugate_gradient import cg
from fvp.typing import Params


class CurvatureComparison(NamedTuple):
    """Two curvatures A and B side by side; scalars."""

    difference: Array  # |A - B| / |A|, Frobenius norms
    cosine: Array  # <A, B> / (|A| |B|); 1 where one is a multiple of the other
    ratio: Array  # |B| / |A|
    step_cosine: Array  # of the angle between (A + damping I)^-1 g and (B + damping I)^-1 g
    step_ratio: Array  # length of the second over that of the first
    converged: Array  # bool, whether both steps have


def compare_curvatures(
    first: Any,
    second: Any,
    gradient: Params,
    key: Array,
    *,
    damping: ArrayLike,
    num_products: int = 50,
    tol: ArrayLike = 1e-5,
    maxiter: int | None = None,
) -> CurvatureComparison:
    r"""How far apart two curvatures are, and the damped natural gradients that they lead to.

    Such as the Fisher and what is taken for it: the empirical Fisher is of the size of the
    residuals and not of the outputs, so that near a minimum it is both too small and turned, and
    its natural gradient the longer the smaller the gradients. Norms are Frobenius norms, traces of
    squares, estimated by `fvp.trace`: exact for up to ``num_products`` parameters.

    Args:
      first: a curvature operator A, or any symmetric callable ``v -> A v`` on trees.
      second: another one, B.
      gradient: pytree g like what they multiply.
      key: a ``jax.random`` key.
      damping: multiple of the identity that is added to both.
      num_products: for each of the traces of A^2, B^2 and (A - B)^2; they take two products of each
        operator that is in them.
      tol: of the two solves, see `fvp.cg`.
      maxiter: of the two solves likewise.

    Returns:
      A `fvp.CurvatureComparison` of scalars. Where A is zero and B is not, difference and
      ratio are infinite; cosines with zero are zero.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> x, y = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.1], [1.9], [3.2]])
      >>> model, head, w = lambda w, x: x @ w, fvp.Gaussian(), jnp.ones((1, 1))
      >>> F = fvp.fisher(model, head, w, x)
      >>> E = fvp.empirical_fisher(model, head, w, x, y)
      >>> gradient = F.value_and_grad(y)[1]
      >>> c = fvp.compare_curvatures(F, E, gradient, jax.random.key(0), damping=0.0)
      >>> print(f"the curvature by {c.ratio:.3f}, the step by {c.step_ratio:.1f}")
      the curvature by 0.029, the step by 34.1

    Reference:
      F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for
      natural gradient descent, 2019.
    """
    gradient = check_inexact_tree(gradient, "gradient")
    check_nonnegative(damping, "damping")
    solve = lambda operator: cg(operator, gradient, damping=damping, tol=tol, maxiter=maxiter)
    (a_step, a_info), (b_step, b_info) = solve(first), solve(second)
    lengths = tree_vdot(a_step, a_step), tree_vdot(b_step, b_step)
    unit = _unit((first, second), gradient, key)
    square = lambda operator: trace(_Square(operator, unit), key, num_products, like=gradient)
    a, b, apart = square(first), square(second), square(_Difference(first, second))
    return CurvatureComparison(
        difference=_root_of_ratio(apart, a),
        cosine=_cosine((a + b - apart) / 2, a, b),
        ratio=_root_of_ratio(b, a),
        step_cosine=_cosine(tree_vdot(a_step, b_step), *lengths),
        step_ratio=_root_of_ratio(lengths[1], lengths[0]),
        converged=a_info.converged & b_info.converged,
    )


@dataclasses.dataclass(frozen=True)
class _Difference(Record):
    """A - B."""

    first: Any
    second: Any

    def mv(self, v: Params) -> Params:
        return jax.tree.map(jnp.subtract, _product(self.first, v), _product(self.second, v))


@dataclasses.dataclass(frozen=True)
class _Square(Record):
    """A^2 / unit^2, without the squares of what is tiny."""

    operator: Any
    unit: Array

    def mv(self, v: Params) -> Params:
        for _ in range(2):
            product = _product(self.operator, v)
            v = jax.tree.map(lambda x: (x / self.unit).astype(x.dtype), product)
        return v


def _product(operator: Any, v: Params) -> Params:
    return getattr(operator, "mv", operator)(v)


@compiled_for_operators
def _unit(operators: tuple[Any, ...], like: Params, key: Array) -> Array:
    """A power of two of the size of what operators do to a random vector of the length one."""
    raveled = [Raveled.of(operator, like) for operator in operators]
    v = jax.random.normal(key, (raveled[0].size,), raveled[0].dtype)
    v /= jnp.linalg.norm(v)
    return power_of_two(jnp.max(jnp.stack([jnp.max(jnp.abs(A.mv(v))) for A in raveled])))


def _cosine(product: Array, a: Array, b: Array) -> Array:
    """<a, b> over the norms, from the product and both squares."""
    scale = jnp.sqrt(a) * jnp.sqrt(b)
    return jnp.clip(jnp.where(scale > 0, product / jnp.where(scale > 0, scale, 1), 0), -1, 1)


def _root_of_ratio(square: Array, over: Array) -> Array:
    """The root of a ratio of squares that may be zero to rounding; 0 / 0 is 0."""
    square, over = jnp.maximum(square, 0), jnp.maximum(over, 0)
    root = jnp.sqrt(square / jnp.where(over > 0, over, 1))
    return jnp.where(over > 0, root, jnp.where(square > 0, jnp.inf, 0))
