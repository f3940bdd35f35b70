"""Derivatives of solutions, forward and reverse, equal those of dense solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, rarely, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

CASE, MODEL = CASES["softmax"], mlp((3,))
RNG = np.random.default_rng(0)
X, PARAMS, RHS = jnp.asarray(RNG.normal(size=(6, 2))), parameters(RNG, 3), parameters(RNG, 3)
DAMPING = 0.1
TARGETS = CASE.targets(RNG, (6,))
ARGUMENTS = {"operator": 0, "rhs": 1, "damping": 2}

every_argument = pytest.mark.parametrize("number", ARGUMENTS.values(), ids=ARGUMENTS)


def functional(x):
    """A scalar of a solution that is not linear in it."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(x))


def fisher(params):
    return fvp.fisher(MODEL, CASE.head, params, X)


def by_cg(params, rhs, damping, **options):
    return functional(fvp.cg(fisher(params), rhs, damping=damping, tol=1e-13, **options)[0])


def by_a_function(params, rhs, damping):
    """That closes over all of it, and so does its preconditioner."""
    multiply = lambda v: jax.tree.map(lambda Fv, v: Fv + damping * v, fisher(params) @ v, v)
    M = lambda v: jax.tree.map(lambda v: v / damping, v)
    return functional(fvp.cg(multiply, rhs, tol=1e-13, M=M)[0])


def by_cg_with_factors(params, rhs, damping):
    M = fvp.kfac(MODEL, CASE.head, params, X).inverse(damping)
    return by_cg(params, rhs, damping, M=M, x0=jax.tree.map(lambda r: 2 * r, rhs))


def by_dual(params, rhs, damping):
    return functional(fvp.solve_dual(fisher(params), rhs, damping))


def by_dual_with_targets(params, rhs, damping):
    F = fisher(params)
    _, gradient = F.value_and_grad(TARGETS)
    rhs = jax.tree.map(jnp.add, gradient, rhs)
    return functional(fvp.solve_dual(F, rhs, damping, targets=TARGETS))


def by_dense(params, rhs, damping, with_gradient=False):
    flat, unravel = ravel_pytree(params)
    outputs = lambda flat: MODEL(unravel(flat), X)
    J, p = jax.jacobian(outputs)(flat), jax.nn.softmax(outputs(flat))
    H = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    F = jnp.einsum("ncp,ncd,ndq->pq", J, H, J) / 6
    b = ravel_pytree(rhs)[0]
    if with_gradient:
        b += jax.grad(lambda flat: CASE.head.nll(outputs(flat), TARGETS).mean())(flat)
    return functional(unravel(jnp.linalg.solve(F + damping * jnp.eye(flat.size), b)))


SOLVES = {
    "cg": by_cg,
    "cg of a function": by_a_function,
    "cg with factors and a start": by_cg_with_factors,
    "dual": by_dual,
    "dual with targets": by_dual_with_targets,
}
every_solve = pytest.mark.parametrize(
    "solve",
    [rarely(solve) if solve in (by_a_function, by_dual) else solve for solve in SOLVES.values()],
    ids=SOLVES,
)


@functools.cache
def expected(with_gradient):
    arguments = (PARAMS, RHS, DAMPING)
    return jax.jit(jax.grad(functools.partial(by_dense, with_gradient=with_gradient), (0, 1, 2)))(
        *arguments
    )


@every_solve
def test_reverse_mode(solve):
    actual = jax.jit(jax.grad(solve, (0, 1, 2)))(PARAMS, RHS, DAMPING)
    for a, b in zip(actual, expected(solve is by_dual_with_targets), strict=True):
        assert relative_error(a, b) < 1e-8


@every_solve
def test_forward_mode(solve):
    tangents = (parameters(RNG, 3), parameters(RNG, 3), 1.0)
    _, actual = jax.jit(lambda *t: jax.jvp(solve, (PARAMS, RHS, DAMPING), t))(*tangents)
    gradients = expected(solve is by_dual_with_targets)
    product = lambda a, b: jnp.vdot(ravel_pytree(a)[0], ravel_pytree(b)[0])
    total = sum(map(product, gradients, tangents))
    np.testing.assert_allclose(actual, total, rtol=1e-8)


def test_eager_derivatives():
    for solve in (by_cg, by_a_function):
        actual = jax.grad(solve, 2)(PARAMS, RHS, DAMPING)
        np.testing.assert_allclose(actual, expected(False)[2], rtol=1e-8)


def test_derivatives_through_the_leaves_of_an_operator():
    """The operator crosses jit as an argument, and its cotangents are like it."""
    solve = lambda F: functional(fvp.cg(F, RHS, damping=DAMPING, tol=1e-13)[0])
    F, pull = jax.vjp(fisher, PARAMS)
    (actual,) = pull(jax.jit(jax.grad(solve, allow_int=True))(F))
    assert relative_error(actual, expected(False)[0]) < 1e-8


def test_second_derivatives():
    second = lambda solve: jax.jit(jax.grad(jax.grad(solve, 2), 2))(PARAMS, RHS, DAMPING)
    np.testing.assert_allclose(second(by_cg), second(by_dense), rtol=1e-8)


def test_derivatives_under_vmap():
    dampings = jnp.array([0.05, 0.1, 1.0])
    gradients = lambda solve: jax.vmap(jax.grad(lambda d: solve(PARAMS, RHS, d)))(dampings)
    np.testing.assert_allclose(
        jax.jit(gradients, static_argnums=0)(by_cg), gradients(by_dense), rtol=1e-8
    )


@every_argument
def test_the_numbers_of_the_record_have_derivatives(number):
    """The quadratic model, and the curvature along the solution."""
    arguments = (PARAMS, RHS, DAMPING)

    def numbers(solve):
        def of(argument):
            return solve(*arguments[:number], argument, *arguments[number + 1 :])

        return jax.jit(jax.jacrev(of))(arguments[number])

    def by_record(params, rhs, damping):
        _, info = fvp.cg(fisher(params), rhs, damping=damping, tol=1e-13)
        return jnp.stack([info.model_value, info.curvature, info.damping_term])

    def by_definition(params, rhs, damping):
        F = fisher(params)
        b, unravel = ravel_pytree(rhs)
        x = jnp.linalg.solve(F.dense() + damping * jnp.eye(b.size), b)
        curvature, term = F.quadratic_form(unravel(x)), damping * x @ x
        return jnp.stack([0.5 * (curvature + term) - b @ x, curvature, term])

    assert relative_error(numbers(by_record), numbers(by_definition)) < 1e-8


def test_absolute_tolerances_hold_for_derivatives_by_their_ratio():
    loose = lambda d: functional(fvp.cg(fisher(PARAMS), RHS, damping=d, tol=0.0, atol=1e-12)[0])
    np.testing.assert_allclose(jax.grad(loose)(DAMPING), expected(False)[2], rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes_are_differentiated(dtype):
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    solve = lambda rhs, d: functional(
        fvp.cg(lambda v: jax.tree.map(jnp.add, v, v), rhs, damping=d)[0]
    )
    gradient, slope = jax.grad(solve, (0, 1))(narrow(RHS), jnp.ones((), dtype))
    exact = jax.grad(lambda rhs, d: functional(jax.tree.map(lambda r: r / (2 + d), rhs)), (0, 1))
    wanted, wanted_slope = exact(RHS, 1.0)
    assert gradient["out"]["w"].dtype == slope.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    assert relative_error(gradient, wanted) < tolerance
    np.testing.assert_allclose(slope, wanted_slope, rtol=tolerance)


def test_zero_right_hand_side_has_derivatives():
    solve = lambda b: fvp.cg(lambda v: 2 * v, b, damping=1.0)[0]
    np.testing.assert_allclose(jax.jacrev(solve)(jnp.zeros(3)), np.eye(3) / 3, rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(solve)(jnp.zeros(3)), np.eye(3) / 3, rtol=1e-12)


def test_a_solve_that_is_not_differentiated_multiplies_as_often_as_before():
    products = []

    def operator(v):
        jax.debug.callback(lambda: products.append(None))
        return jnp.arange(1.0, 6.0) * v

    solve = lambda b: fvp.cg(operator, b, tol=1e-12)
    _, info = jax.jit(solve)(jnp.ones(5))
    jax.effects_barrier()
    assert len(products) == int(info.iterations)
