"""Derivatives of a solution: by the equation that it solves, not through the iteration.

Of A x + damping x = b, with dots for tangents,

    (A + damping I) x. = b. - A. x - damping. x,

which is the same system again, and symmetric, so that reverse mode is one more solve as well. Where
nothing is differentiated it costs nothing: the rule is traced when a derivative is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fvp.numerics import cast_like, tree_axpy, tree_norm, tree_vdot, widen_tree
from fvp.solvers.cg_iteration import CGInfo, LinearSystem, precondition, product_and_form, solve
from fvp.typing import Params, PyTree


def solve_implicitly(system: LinearSystem, rhs: Params, x0: Params | None) -> tuple[Params, CGInfo]:
    """The solve of `cg_iteration.py`, for D = I, differentiable in operator, damping and ``rhs``.

    The start, the preconditioner and the tolerances have no derivatives, nor has the residual norm.
    """
    leaves, structure = jax.tree.flatten((_without_closures(system, rhs), rhs, x0))
    numbers = [i for i, leaf in enumerate(leaves) if _is_differentiable(leaf)]

    def merged(data: Sequence[Array]) -> tuple[LinearSystem, Params, Params | None]:
        whole = list(leaves)
        for i, leaf in zip(numbers, data, strict=True):
            whole[i] = leaf
        return jax.tree.unflatten(structure, whole)

    @jax.custom_jvp
    def run(data: Sequence[Array]) -> tuple[Params, CGInfo]:
        return solve(*merged(data))

    @run.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        x, info = run(*primals)
        (data,), (data_dot,) = primals, tangents
        residual = lambda data: _residual(*merged(data)[:2], x)
        residual_dot = jax.jvp(residual, (data,), (data_dot,))[1]
        x_dot = _solved_again(*merged(data)[:2], residual_dot)
        values = lambda data, x: _values(*merged(data)[:2], x)
        dots = jax.jvp(values, (data, x), (data_dot, x_dot))[1]
        return (x, info), (x_dot, jax.tree.map(_no_tangent, info)._replace(**dots))

    return run([leaves[i] for i in numbers])


def _residual(system: LinearSystem, rhs: Params, x: Params) -> Params:
    """The right-hand side less (A + damping I) x."""
    return cast_like(tree_axpy(-1, _product(system, rhs, x), widen_tree(rhs)), rhs)


def _product(system: LinearSystem, rhs: Params, x: Params) -> Params:
    """(A + damping I) x, in float32 or wider."""
    product, _ = product_and_form(system.operator, x, rhs)
    return tree_axpy(system.damping, widen_tree(x), product)


def _solved_again(system: LinearSystem, rhs: Params, other: Params) -> Params:
    """(A + damping I)^-1 times ``other``, to the relative tolerance of the solve for ``rhs``."""
    norm = tree_norm(rhs)
    tol = jnp.maximum(system.tol, system.atol / jnp.where(norm > 0, norm, jnp.inf))
    system = system._replace(tol=tol, atol=0.0)
    product = lambda v: cast_like(_product(system, rhs, v), rhs)
    inverse = lambda _, b: solve(system, b, None)[0]
    return jax.lax.custom_linear_solve(product, other, inverse, symmetric=True)


def _values(system: LinearSystem, rhs: Params, x: Params) -> dict[str, Array]:
    """What of `fvp.CGInfo` is a function of the solution."""
    _, form = product_and_form(system.operator, x, rhs)
    damping_term = (jnp.asarray(system.damping) * tree_vdot(x, x)).astype(form.dtype)
    model_value = 0.5 * (form + damping_term) - tree_vdot(rhs, x).astype(form.dtype)
    return {"model_value": model_value, "curvature": form, "damping_term": damping_term}


def _is_differentiable(leaf: Any) -> bool:
    return _is_number(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int))


def _no_tangent(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Closed:
    """A linear map, with what it closed over as leaves."""

    function: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    values: Sequence[Array]

    def __call__(self, v: Params) -> Any:
        return self.function(v, *self.values)

    mv_and_form = __call__


def _without_closures(system: LinearSystem, rhs: Params) -> LinearSystem:
    """The system with its functions as pytrees: a rule sees no other values than its arguments."""
    operator, inverse = system.operator, system.M
    if _has_closure(operator):
        multiply = lambda v: product_and_form(operator, v, rhs)
        system = system._replace(operator=_Closed(*jax.closure_convert(multiply, rhs)))
    if _has_closure(inverse):
        apply = lambda r: precondition(inverse, r)
        system = system._replace(M=_Closed(*jax.closure_convert(apply, widen_tree(rhs))))
    return system


def _has_closure(linear_map: PyTree) -> bool:
    return not all(map(_is_number, jax.tree.leaves(linear_map)))
