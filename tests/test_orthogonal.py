"""Exact solves by QR of the whitened Jacobian, whose square has lost what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import relative_error

import fvp
from fvp.solvers.damped import DampedCurvature, Moment

COMPILE_QUICKLY = True
EPS = float(np.finfo(float).eps)


def system_of(model_fn, params, x, targets, solver, damping, **options):
    """The system of one step on a Gaussian, and the gradient at the targets."""
    F = fvp.fisher(model_fn, fvp.Gaussian(), params, x, **options)
    gradient = F.value_and_grad(targets)[1]
    moment = Moment(jnp.zeros((), int), jnp.linalg.norm(gradient), targets, jnp.array(False))
    return solver.prepare(DampedCurvature(F, damping), moment, None)[0], gradient


def linear(w, x):
    return x @ w


def spectrum(rows, columns, least, seed=0):
    """U, s, V of a matrix whose singular values fall from 1 to ``least``, evenly in their logs."""
    rng, size = np.random.default_rng(seed), min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(n, size)))[0] for n in (rows, columns))
    return u, np.geomspace(1, least, size), v


SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("dense", "tall"),
        ("dense", "wide"),
        ("dense", "square"),
        ("dual", "wide"),
        ("dual", "square"),
    ],
)
def test_singular_values_far_below_the_root_of_eps_are_kept(solver, name):
    """1e-11 of the largest: the square of the matrix holds none below 1e-8."""
    kind = {"dense": fvp.Dense, "dual": fvp.Dual}[solver]
    rows, columns = SHAPES[name]
    u, s, v = spectrum(rows, columns, 1e-11)
    x, w = jnp.asarray(np.sqrt(rows) * (u * s) @ v.T), np.zeros((columns, 1))
    solution = v @ np.random.default_rng(1).normal(size=len(s))
    targets = -x @ solution[:, None]

    def solve(w, targets):
        system, gradient = system_of(linear, w, x, targets, kind(qr=True), 0.0)
        return system.solve(gradient, None)[0]

    found = jax.jit(solve)(jnp.asarray(w), targets)[:, 0]
    # The error of a backward stable solution is about eps times the condition number.
    assert relative_error(found, solution) < 100 * EPS / 1e-11
    system, gradient = system_of(linear, jnp.asarray(w), x, targets, kind(), 0.0)
    assert relative_error(system.solve(gradient, None)[0][:, 0], solution) > 0.1


def two_layers(params, x):
    w, v = params[:6].reshape(2, 3), params[6:].reshape(3, 2)
    return jnp.tanh(x @ w) @ v


PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=12))
X = {n: jnp.asarray(np.random.default_rng(1).normal(size=(n, 2))) for n in (4, 9)}


def slope(params, x):
    """Uses its parameters twice, as differential equations do."""
    return jax.jvp(lambda x: two_layers(params, x), (x,), (x**2,))[1]


@pytest.mark.parametrize("solver", [fvp.Dense(qr=True), fvp.Dual(qr=True)], ids=["dense", "dual"])
@pytest.mark.parametrize("model", [two_layers, slope])
@pytest.mark.parametrize("examples", X)
@pytest.mark.parametrize("damping", [1e-3, 1e-10])
def test_what_is_no_gradient_at_the_targets_is_solved_as_well(solver, model, examples, damping):
    """A pull, weights of zero, a change of outputs; against the dense system."""
    x, rng = X[examples], np.random.default_rng(2)
    targets, weights = jnp.asarray(rng.normal(size=(examples, 2))), jnp.arange(examples) / 2.0
    pull, bend = jnp.asarray(rng.normal(size=12)), jnp.asarray(rng.normal(size=targets.shape))

    def solve(params, targets):
        options = {"weights": weights}
        system, gradient = system_of(model, params, x, targets, solver, damping, **options)
        rhs = gradient + damping * pull
        matrix = system.damped.operator.dense() + damping * jnp.eye(12)
        bent = system.damped.operator.transpose_product(bend)
        solved = system.solve(rhs, None)[0], system.solve_outputs(bend)
        return solved, tuple(jnp.linalg.solve(matrix, b) for b in (rhs, bent))

    for found, expected in zip(*jax.jit(solve)(PARAMS, targets), strict=True):
        assert relative_error(found, expected) < 1e-12 / damping


@pytest.mark.parametrize("solver", [fvp.Dense(qr=True), fvp.Dual(qr=True)], ids=["dense", "dual"])
@pytest.mark.parametrize("examples", X)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_record_is_that_of_products_with_the_operator(solver, examples, weighted):
    x, targets = X[examples], jnp.ones((examples, 2))
    options = {"weights": jnp.arange(examples) - 1.0} if weighted else {}
    options = options if isinstance(solver, fvp.Dense) else {}  # the other takes no negative ones
    system, gradient = system_of(slope, PARAMS, x, targets, solver, 1e-2, **options)
    rhs = gradient + 1e-2 * PARAMS
    found, info = system.solve(rhs, None)
    expected = system.damped.record(found, rhs)
    np.testing.assert_allclose(info.residual_norm, expected.residual_norm, atol=1e-12)
    for name in ("model_value", "curvature", "damping_term"):
        np.testing.assert_allclose(getattr(info, name), getattr(expected, name), rtol=1e-10)


def test_rows_serve_where_the_matrix_of_examples_is_made_of_them():
    """Parameters that are used more than once; else layers make it without."""
    for model, kind in ((slope, "OrthogonalSystem"), (two_layers, "DualSystem")):
        solver, targets = fvp.Dual(qr=True), jnp.ones((4, 2))
        system, _ = system_of(model, PARAMS, X[4], targets, solver, 0.0)
        assert type(system).__name__ == kind


def test_it_is_by_the_square_where_damping_is_above_its_rounding(monkeypatch):
    """Same result; which of both was taken shows in what QR was replaced with."""
    broken = lambda root, damping, mode="reduced": jnp.linalg.qr(jnp.nan * root, mode=mode)
    monkeypatch.setattr("fvp.solvers.orthogonal.qr_above_damping", broken)
    targets = jnp.ones((9, 2))
    for damping, finite in ((1e-3, True), (0.0, False)):
        solver = fvp.Dense(qr=True)
        system, gradient = system_of(two_layers, PARAMS, X[9], targets, solver, damping)
        assert bool(jnp.isfinite(system.solve(gradient, None)[0]).all()) == finite


def test_examples_of_negative_weight_are_left_out_of_the_matrix():
    weights, targets = jnp.array([1, -1, 1, 1.0]), jnp.ones((4, 2))
    options = {"weights": weights}
    solver = fvp.Dense(qr=True)
    system, gradient = system_of(two_layers, PARAMS, X[4], targets, solver, 1e-2, **options)
    kept = fvp.fisher(two_layers, fvp.Gaussian(), PARAMS, X[4], weights=jnp.maximum(weights, 0))
    matrix = kept.dense() * 3 / 2 + 1e-2 * jnp.eye(12)
    assert (
        relative_error(system.solve(gradient, None)[0], jnp.linalg.solve(matrix, gradient)) < 1e-9
    )


@pytest.mark.parametrize("solver", [fvp.Dense(qr=True), fvp.Dual(qr=True)], ids=["dense", "dual"])
def test_a_jacobian_too_large_for_memory_is_squared(solver, monkeypatch):
    monkeypatch.setattr("fvp.solvers.dense.MOST_ENTRIES", 10)
    monkeypatch.setattr("fvp.solvers.whitened_jacobian.MOST_ENTRIES", 10)
    system, _ = system_of(two_layers, PARAMS, X[4], jnp.ones((4, 2)), solver, 0.0)
    trace = jnp.trace(system.damped.operator.dense())
    np.testing.assert_allclose(system.damped.damping, 8 * EPS * trace)


def test_float32_keeps_singular_values_below_the_root_of_its_eps():
    u, s, v = spectrum(24, 10, 1e-5)
    x = jnp.asarray(np.sqrt(24) * (u * s) @ v.T, jnp.float32)
    solution = (v @ np.ones(10)).astype(np.float32)
    targets = -x @ solution[:, None]
    solver, w = fvp.Dense(qr=True), jnp.zeros((10, 1), jnp.float32)
    system, gradient = system_of(linear, w, x, targets, solver, 0.0)
    assert system.damped.damping < 1e-10
    assert relative_error(system.solve(gradient, None)[0][:, 0], solution) < 0.1
