"""Conjugate gradients: identities against dense solves and a plain NumPy recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvp
from fvp.solvers.conjugate_gradient import iteration_limit

COMPILE_QUICKLY = True
ON_CPU = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="GPUs divide, and keep bfloat16, with other digits"
)


def symmetric(eigenvalues, seed=0):
    """A float64 matrix with these eigenvalues and random eigenvectors."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    gaussian = np.random.default_rng(seed).standard_normal((eigenvalues.size,) * 2)
    basis, _ = np.linalg.qr(gaussian)
    matrix = basis * eigenvalues @ basis.T
    return (matrix + matrix.T) / 2


def vector(size, seed=1, dtype=np.float64):
    """Entries between 1/2 and 2 in magnitude, so that powers of two scale them exactly."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.5, 2.0, size) * rng.choice([-1.0, 1.0], size)).astype(dtype)


MATRICES = {
    "one_by_one": np.array([[3.0]]),
    "diagonal": np.diag(np.linspace(1.0, 50.0, 12)),
    "well_conditioned": symmetric(np.linspace(1.0, 10.0, 40)),
    "clustered": symmetric(np.repeat([1.0, 20.0, 400.0], 10) * (1 + 1e-9 * np.arange(30))),
    "condition_1e6": symmetric(np.logspace(-6, 0, 40)),
}


def solve(matrix, rhs, inverse=None, **options):
    """All numbers are traced, the defaults too: one compilation for all of them."""
    defaults = {"damping": 0.0, "tol": 1e-5, "atol": 0.0, "maxiter": 10 * rhs.size}
    return compiled(matrix, rhs, inverse, **{**defaults, **options})


@jax.jit
def compiled(matrix, rhs, inverse, **options):
    M = None if inverse is None else lambda r: inverse @ r
    return fvp.cg(lambda v: matrix @ v, rhs, M=M, **options)


class Textbook:
    """The NumPy recurrence: iterates, residual norms and model values after 0, 1, 2, ... steps."""

    def __init__(self, matrix, rhs, steps, x0=None, inverse=None):
        inverse = np.eye(rhs.size) if inverse is None else inverse
        x = np.zeros_like(rhs) if x0 is None else x0
        r = rhs - matrix @ x
        p = inverse @ r
        self.iterates, self.residual_norms, self.values = [], [], []
        for _ in range(steps + 1):
            self.iterates.append(x)
            self.residual_norms.append(np.linalg.norm(r))
            self.values.append(0.5 * x @ matrix @ x - rhs @ x)
            product, rho = matrix @ p, r @ inverse @ r
            if p @ product <= 0:
                break
            x = x + rho / (p @ product) * p
            r = r - rho / (p @ product) * product
            p = inverse @ r + (r @ inverse @ r) / rho * p

    def progress_stop(self, eps):
        """The first step at which Martens' (2010) criterion holds."""
        for i, value in enumerate(self.values):
            k = max(10, -(-i // 10))
            if i > k and value < 0 and (value - self.values[i - k]) / value < k * eps:
                return i
        raise AssertionError("the reference run is too short")


def assert_failed(x, info):
    assert bool(info.breakdown)
    assert not bool(info.converged)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(x))


# Solutions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solution_equals_dense_solve(name, damping):
    matrix = MATRICES[name]
    rhs = vector(len(matrix))
    damped = matrix + damping * np.eye(len(matrix))
    tol = max(1e-13, 1e-15 * np.linalg.cond(damped))  # below it float64 holds no solution
    x, info = solve(matrix, rhs, damping=damping, tol=tol)
    expected = np.linalg.solve(damped, rhs)
    bound = 1e-15 * len(matrix) * np.linalg.cond(damped) + 1e-13
    assert np.linalg.norm(x - expected) <= bound * np.linalg.norm(expected)
    assert bool(info.converged)
    assert not bool(info.breakdown)
    assert float(info.residual_norm) <= tol * np.linalg.norm(rhs)


def test_clustered_eigenvalues_cost_one_iteration_per_cluster():
    matrix = MATRICES["clustered"]
    _, info = solve(matrix, vector(len(matrix)), tol=1e-4)
    assert int(info.iterations) == 3


@pytest.mark.parametrize("size", [43_000, 1_000_000])
def test_large_float32_identity_takes_one_iteration(size):
    rhs = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    x, info = jax.jit(lambda b: fvp.cg(lambda v: v, b))(rhs)
    assert int(info.iterations) == 1
    assert bool(info.converged)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, rhs, rtol=3e-7)


def test_million_parameter_float32_system_matches_the_closed_form():
    diagonal = jnp.linspace(1.0, 30.0, 1_000_000, dtype=jnp.float32)
    rhs = jax.random.normal(jax.random.key(0), diagonal.shape, jnp.float32)
    x, info = jax.jit(lambda b: fvp.cg(lambda v: diagonal * v, b, tol=1e-6))(rhs)
    assert bool(info.converged)
    assert int(info.iterations) < 60
    error = np.linalg.norm(np.asarray(diagonal, float) * np.asarray(x, float) - rhs)
    assert error <= 3e-6 * np.linalg.norm(rhs)


def test_exact_preconditioner_takes_one_iteration():
    matrix, rhs = MATRICES["condition_1e6"], vector(40)
    inverse = np.linalg.inv(matrix + 1e-3 * np.eye(40))
    x, info = solve(matrix, rhs, damping=1e-3, inverse=inverse)
    assert int(info.iterations) == 1
    assert bool(info.converged)
    np.testing.assert_allclose(x, inverse @ rhs, rtol=1e-8)


def test_preconditioned_iterates_equal_the_textbook():
    matrix, rhs = MATRICES["condition_1e6"], vector(40)
    inverse = symmetric(np.linspace(1, 3, 40), 5)
    x, info = solve(matrix, rhs, inverse=inverse, tol=0.0, maxiter=7)
    assert int(info.iterations) == 7
    np.testing.assert_allclose(x, Textbook(matrix, rhs, 7, inverse=inverse).iterates[7], rtol=1e-10)


# Scale -------------------------------------------------------------------------------------------

SCALE_CASES = {
    "well_conditioned": ("well_conditioned", {}),
    "condition_1e6": ("condition_1e6", {"maxiter": 60}),
    "preconditioned": ("well_conditioned", {"inverse": symmetric(np.linspace(1, 3, 40), 5)}),
    "damped": ("well_conditioned", {"damping": 0.37}),
    "damped_preconditioned": (
        "condition_1e6",
        {"inverse": symmetric(np.linspace(1, 3, 40), 5), "damping": 1e-3, "maxiter": 60},
    ),
    "progress": ("condition_1e6", {"tol": 0.0, "progress_tol": 5e-4, "maxiter": 60}),
}


@pytest.mark.compile_in_full
@pytest.mark.parametrize("case", SCALE_CASES)
def test_power_of_two_scales_the_float32_solution_to_the_last_bit(case):
    name, options = SCALE_CASES[case]
    cast = {k: np.float32(v) if k == "inverse" else v for k, v in options.items()}
    matrix, rhs = MATRICES[name].astype(np.float32), vector(40, dtype=np.float32)
    x, info = solve(matrix, rhs, **cast)
    assert int(info.iterations) > 5
    for k in range(-100, 101):
        x_scaled, scaled = solve(matrix, np.ldexp(rhs, k), **cast)
        np.testing.assert_array_equal(x_scaled, np.ldexp(np.asarray(x), k), err_msg=f"2**{k}")
        assert int(scaled.iterations) == int(info.iterations)
        assert bool(scaled.converged) == bool(info.converged)
        residual_norm = np.ldexp(np.float64(scaled.residual_norm), -k)
        np.testing.assert_allclose(residual_norm, info.residual_norm, rtol=1e-6)
        # Quadratic in the scale, these may leave the range of float32, but only to 0 or infinity.
        assert not np.isnan(scaled.model_value)
        assert not np.isnan(scaled.curvature)


@ON_CPU
@pytest.mark.compile_in_full
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(jnp.bfloat16, (-100, 100)), (jnp.float16, (-6, 6)), (jnp.float64, (-900, 900))],
)
def test_power_of_two_scales_the_solution_in_every_dtype(dtype, exponents):
    diagonal = jnp.asarray([1, 2, 4, 8, 16], dtype)
    rhs = jnp.asarray([1, -1.5, 1.25, 0.5, -1.75], dtype)
    run = jax.jit(lambda b: fvp.cg(lambda v: diagonal * v, b, tol=1e-3, maxiter=5))
    x, info = run(rhs)
    for k in exponents:
        x_scaled, scaled = run(rhs * jnp.asarray(2.0**k, dtype))
        np.testing.assert_array_equal(
            np.asarray(x_scaled, np.float64), np.ldexp(np.asarray(x, np.float64), k)
        )
        assert int(scaled.iterations) == int(info.iterations)


@pytest.mark.compile_in_full
def test_power_of_two_scales_the_warm_started_solution_too():
    matrix, rhs = MATRICES["well_conditioned"].astype(np.float32), vector(40, dtype=np.float32)
    x0 = vector(40, 2, np.float32)
    x, info = solve(matrix, rhs, x0=x0)
    for k in (-100, -37, 100):
        x_scaled, scaled = solve(matrix, np.ldexp(rhs, k), x0=np.ldexp(x0, k))
        np.testing.assert_array_equal(x_scaled, np.ldexp(np.asarray(x), k))
        assert int(scaled.iterations) == int(info.iterations)


# Stopping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("tol", "atol"), [(1e-1, 0.0), (1e-5, 0.0), (0.0, 1e-3), (1e-2, 1e-4), (1e-4, 1e-1)]
)
def test_residual_stop_is_that_of_scipy(tol, atol, warm):
    """Stops at the first ||b - A x|| <= max(tol ||b||, atol), also with a preconditioner."""
    matrix, rhs = MATRICES["well_conditioned"], 7 * vector(40)
    inverse = np.diag(np.linspace(1, 2, 40))
    x0 = 50 * vector(40, 2) if warm else None
    reference = Textbook(matrix, rhs, 40, x0, inverse)
    threshold = max(tol * np.linalg.norm(rhs), atol)
    expected = next(i for i, norm in enumerate(reference.residual_norms) if norm <= threshold)
    x, info = solve(matrix, rhs, x0=x0, inverse=inverse, tol=tol, atol=atol)
    assert int(info.iterations) == expected
    assert bool(info.converged)
    np.testing.assert_allclose(info.residual_norm, reference.residual_norms[expected], rtol=1e-6)
    np.testing.assert_allclose(x, reference.iterates[expected], rtol=1e-8)


@pytest.mark.parametrize("maxiter", [0, 1, 6])
@pytest.mark.parametrize("warm", [False, True])
def test_zero_tolerance_runs_a_fixed_number_of_iterations(maxiter, warm):
    matrix, rhs = MATRICES["well_conditioned"], vector(40)
    x0 = vector(40, 2) if warm else None
    reference = Textbook(matrix, rhs, maxiter, x0)
    x, info = solve(matrix, rhs, x0=x0, tol=0.0, maxiter=maxiter)
    assert int(info.iterations) == maxiter
    assert not bool(info.converged)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, reference.iterates[maxiter], rtol=1e-11)
    np.testing.assert_allclose(info.residual_norm, reference.residual_norms[maxiter], rtol=1e-10)


def test_zero_tolerance_stops_at_an_exactly_zero_residual():
    rhs = jnp.asarray([1.0, 2.0, -4.0])
    x, info = solve(2 * jnp.eye(3), rhs, tol=0.0, maxiter=20)
    np.testing.assert_array_equal(x, rhs / 2)
    assert int(info.iterations) == 1
    assert bool(info.converged)
    assert float(info.residual_norm) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_iterating_far_past_convergence_keeps_the_solution(dtype):
    """Underflow of a residual that is zero in all but name is not a breakdown."""
    matrix, rhs = symmetric(np.linspace(1, 3, 5)), vector(5)
    x, info = solve(matrix.astype(dtype), rhs.astype(dtype), tol=0.0, maxiter=1000)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("start", ["cold", "warm", "preconditioned"])
def test_progress_stop_is_that_of_martens(start):
    """k = max(10, ceil(i / 10)): a large eps stops as soon as i > k, a small one where k grows."""
    diagonal, rhs = np.linspace(3e-5, 1, 600), vector(600)
    x0 = 30 * vector(600, 2) if start == "warm" else None
    inverse = np.linspace(1.2, 1, 600) if start == "preconditioned" else None
    dense = None if inverse is None else np.diag(inverse)
    reference = Textbook(np.diag(diagonal), rhs, 150, x0, dense)
    M = None if inverse is None else lambda r: inverse * r
    options = {"x0": x0, "M": M, "tol": 0.0, "maxiter": 200}
    run = jax.jit(lambda b, eps: fvp.cg(lambda v: diagonal * v, b, progress_tol=eps, **options))
    bounds = (0.5, 5e-2, 5e-4, 1e-7)
    stops = [reference.progress_stop(eps) for eps in bounds]
    assert stops[0] <= 12 < stops[1] < stops[2] < 100 < stops[3]
    for eps, expected in zip(bounds, stops, strict=True):
        x, info = run(rhs, eps)
        assert int(info.iterations) == expected
        assert not bool(info.breakdown)
        error = np.linalg.norm(x - reference.iterates[expected])
        assert error <= 1e-9 * np.linalg.norm(reference.iterates[expected])
        np.testing.assert_allclose(info.model_value, reference.values[expected], rtol=1e-9)


def test_progress_does_not_stop_a_solve_that_is_still_worse_than_zeros():
    diagonal, rhs, x0 = np.linspace(3e-5, 1, 200), vector(200), 1e4 * vector(200, 2)
    expected = Textbook(np.diag(diagonal), rhs, 60, x0).progress_stop(0.5)
    assert expected > 30
    run = jax.jit(lambda b: fvp.cg(lambda v: diagonal * v, b, x0=x0, tol=0.0, progress_tol=0.5))
    assert int(run(rhs)[1].iterations) == expected


def test_progress_looks_back_over_as_many_iterations_as_there_may_be():
    rhs = vector(7)
    for maxiter in (1, 90, 100, 101, 200):
        longest = max(max(10, -(-i // 10)) for i in range(1, maxiter + 1))
        assert iteration_limit(rhs, maxiter) == (maxiter, longest)
    assert iteration_limit(rhs, None) == (70, 10)
    assert iteration_limit({"a": rhs, "b": rhs}, None) == (140, 14)
    windows = []
    jax.eval_shape(lambda n: windows.append(iteration_limit(rhs, n)[1]), 200)
    assert windows == [1024]


def test_residual_stop_still_works_beside_the_progress_stop():
    matrix, rhs = MATRICES["well_conditioned"], vector(40)
    _, plain = solve(matrix, rhs, tol=1e-2)
    _, both = solve(matrix, rhs, tol=1e-2, progress_tol=1e-12, maxiter=40)
    assert int(both.iterations) == int(plain.iterations)
    assert bool(both.converged)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("start", [None, 1e2, 1e6])
def test_converged_means_that_the_true_residual_is_small(condition, start, preconditioned):
    """In float32, where the residual of the recurrence parts from the true one."""
    matrix = symmetric(np.geomspace(1 / condition, 1, 40)).astype(np.float32)
    rhs = vector(40, dtype=np.float32)
    exact = np.linalg.solve(matrix.astype(np.float64), rhs)
    x0 = None if start is None else np.float32(start * exact)
    inverse = np.diag(np.float32(np.linspace(1, 2, 40))) if preconditioned else None
    x, info = solve(matrix, rhs, inverse=inverse, x0=x0, tol=1e-5)
    residual_norm = np.linalg.norm(rhs - matrix.astype(np.float64) @ np.asarray(x, np.float64))
    assert not bool(info.breakdown)
    if bool(info.converged):
        rounding = 1e-6 * np.linalg.norm(x)  # of the product that measures it
        assert residual_norm <= 1e-5 * np.linalg.norm(rhs) + rounding
        np.testing.assert_allclose(info.residual_norm, residual_norm, atol=rounding)
    if condition <= 1e1:
        assert bool(info.converged)
    if condition >= 1e5:
        assert not bool(info.converged)  # float32 does not hold so good a solution


def test_rounding_of_a_start_far_off_is_not_forgotten():
    """It parts the residuals by the size of the start, however small the solution is."""
    matrix, rhs = MATRICES["well_conditioned"].astype(np.float32), vector(40, dtype=np.float32)
    x, info = solve(matrix, rhs, x0=np.float32(1e6) * vector(40, 2, np.float32), tol=1e-2)
    assert bool(info.converged)
    residual_norm = np.linalg.norm(rhs - matrix.astype(float) @ np.asarray(x, float))
    assert residual_norm <= 1.01e-2 * np.linalg.norm(rhs)


def test_a_tolerance_that_the_dtype_can_not_reach_ends_the_solve_before_its_limit():
    """At the second check that finds the true residual hardly smaller."""
    matrix = symmetric(np.geomspace(1e-4, 1, 40)).astype(np.float32)
    for x0 in (None, 100 * vector(40, 2, np.float32)):
        _, info = solve(matrix, vector(40, dtype=np.float32), x0=x0, maxiter=2000)
        assert not bool(info.converged)
        assert not bool(info.breakdown)
        assert int(info.iterations) < 1000


def test_zero_tolerances_are_never_checked():
    products = []

    def operator(v):
        jax.debug.callback(lambda: products.append(None))
        return 2 * v

    _, info = jax.jit(lambda b: fvp.cg(operator, b, tol=0.0))(jnp.ones(3, jnp.float32))
    jax.effects_barrier()
    assert bool(info.converged)
    assert len(products) == int(info.iterations) == 1


def test_exact_start_takes_no_iteration():
    matrix, rhs = MATRICES["well_conditioned"], vector(40)
    x0 = np.linalg.solve(matrix, rhs)
    x, info = solve(matrix, rhs, x0=x0)
    np.testing.assert_array_equal(x, x0)
    assert int(info.iterations) == 0
    assert bool(info.converged)


# The record --------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("maxiter", [0, 5, 200])
def test_model_value_curvature_and_residual_equal_their_dense_forms(warm, damping, maxiter):
    matrix, rhs = MATRICES["well_conditioned"], 3 * vector(40)
    inverse = np.diag(np.linspace(1, 2, 40))
    x0 = vector(40, 2) if warm else None
    x, info = solve(
        matrix, rhs, x0=x0, inverse=inverse, damping=damping, tol=1e-12, maxiter=maxiter
    )
    x, damped = np.asarray(x), matrix + damping * np.eye(40)
    np.testing.assert_allclose(info.curvature, x @ matrix @ x, rtol=1e-10)
    np.testing.assert_allclose(info.damping_term, damping * x @ x, rtol=1e-10)
    np.testing.assert_allclose(info.model_value, 0.5 * x @ damped @ x - rhs @ x, rtol=1e-10)
    residual_norm = np.linalg.norm(rhs - damped @ x)
    np.testing.assert_allclose(info.residual_norm, residual_norm, rtol=1e-6, atol=1e-11)


def test_record_holds_scalar_arrays_of_fixed_types():
    for dtype, wide in [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        info = jax.eval_shape(
            lambda b: fvp.cg(lambda v: v, b)[1], jax.ShapeDtypeStruct((3,), dtype)
        )
        assert info.iterations.dtype == jnp.int32
        assert info.converged.dtype == info.breakdown.dtype == jnp.bool_
        for field in (info.residual_norm, info.model_value, info.curvature, info.damping_term):
            assert field.dtype == wide
        assert all(leaf.shape == () for leaf in jax.tree.leaves(info))
    shapes = [jax.ShapeDtypeStruct((3,), dtype) for dtype in (jnp.float32, jnp.float64)]
    assert jax.eval_shape(lambda b: fvp.cg(lambda v: v, b)[1], shapes).model_value.dtype == wide


# Breakdown: the product that failed counts as an iteration, and leaves x as it was ----------------


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_zero_rhs_gives_zero_in_no_iteration(preconditioned, with_start):
    inverse = np.eye(40, dtype=np.float32) if preconditioned else None
    x0 = vector(40, dtype=np.float32) if with_start else None
    matrix = MATRICES["well_conditioned"].astype(np.float32)
    x, info = solve(matrix, np.zeros(40, np.float32), inverse, x0=x0)
    np.testing.assert_array_equal(x, np.zeros(40))
    assert int(info.iterations) == 0
    assert bool(info.converged)
    assert not bool(info.breakdown)
    assert float(info.residual_norm) == float(info.model_value) == float(info.curvature) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("with_start", [False, True])
def test_non_finite_rhs_is_reported_and_leaves_x_finite(bad, everywhere, with_start):
    rhs = np.full(40, bad) if everywhere else np.where(np.arange(40) == 3, bad, vector(40))
    x0 = vector(40, 2) if with_start else None
    x, info = solve(MATRICES["well_conditioned"], rhs, x0=x0)
    assert_failed(x, info)
    assert int(info.iterations) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_start_leaves_x_finite(bad):
    matrix, rhs = MATRICES["well_conditioned"], vector(40)
    x, info = solve(matrix, rhs, x0=np.where(np.arange(40) == 3, bad, rhs), tol=1e-10)
    assert np.all(np.isfinite(x))
    solved = np.linalg.norm(matrix @ x - rhs) <= 1e-9 * np.linalg.norm(rhs)
    assert bool(info.converged) == solved
    assert bool(info.breakdown) != solved
    # Its other entries count: these are taken for zeros.
    zeros_instead = np.where(np.arange(40) == 3, 0, rhs)
    expected, same = solve(matrix, rhs, x0=zeros_instead, tol=1e-10)
    np.testing.assert_array_equal(x, expected)
    assert int(info.iterations) == int(same.iterations)


@pytest.mark.parametrize(("size", "scale"), [(3e38, 1.0), (1e22, 1e-5)], ids=["product", "form"])
def test_start_whose_product_overflows_counts_as_zeros(size, scale):
    """Or v^T A v alone."""
    matrix = (scale * MATRICES["well_conditioned"]).astype(np.float32)
    rhs = vector(40, dtype=np.float32)
    expected, cold = solve(matrix, rhs)
    x, info = solve(matrix, rhs, x0=np.full(40, size, np.float32))
    assert bool(info.converged)
    assert not bool(info.breakdown)
    assert int(info.iterations) == int(cold.iterations)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_allclose(info.model_value, cold.model_value, rtol=1e-6)


def test_indefinite_matrix_keeps_the_last_good_iterate():
    matrix, rhs = symmetric([-0.5, *np.linspace(1, 10, 19)]), vector(20)
    reference = Textbook(matrix, rhs, 20)
    good = len(reference.iterates) - 1
    assert 2 < good < 20
    x, info = solve(matrix, rhs, tol=1e-12)
    assert_failed(x, info)
    assert int(info.iterations) == good + 1
    np.testing.assert_allclose(x, reference.iterates[good], rtol=1e-9)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(rhs - matrix @ x), rtol=1e-9)
    np.testing.assert_allclose(info.curvature, x @ matrix @ x, rtol=1e-9)

    x, info = solve(matrix, rhs, tol=1e-12, damping=1.0)
    assert bool(info.converged)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, np.linalg.solve(matrix + np.eye(20), rhs), rtol=1e-9)


def test_step_that_failed_is_no_progress():
    """Along negative curvature the model rises, which looks like the end of its fall."""
    matrix, rhs = symmetric([-1e-3, *np.geomspace(1e-2, 1, 39)]), vector(40)
    good = len(Textbook(matrix, rhs, 40).iterates) - 1
    assert good > 12
    x, info = solve(matrix, rhs, tol=0.0, progress_tol=1e-12)
    assert_failed(x, info)
    assert int(info.iterations) == good + 1


@pytest.mark.parametrize("matrix", [-np.eye(4), np.zeros((4, 4))], ids=["negative", "zero"])
def test_first_direction_of_non_positive_curvature_keeps_the_start(matrix):
    for x0 in (None, vector(4, 2)):
        x, info = solve(matrix, vector(4), x0=x0)
        assert_failed(x, info)
        assert int(info.iterations) == 1
        np.testing.assert_array_equal(x, np.zeros(4) if x0 is None else x0)
        np.testing.assert_allclose(info.curvature, x @ matrix @ x, rtol=1e-13, atol=1e-14)


def test_indefinite_matrix_does_not_matter_to_a_rhs_that_never_meets_it():
    x, info = solve(np.diag([1.0, 2.0, -1.0]), np.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(x, [1.0, 0.5, 0.0], atol=1e-15)
    assert bool(info.converged)
    assert not bool(info.breakdown)


@pytest.mark.parametrize(("dtype", "condition"), [(np.float32, 1e6), (np.float64, 1e14)])
def test_small_positive_curvature_is_no_breakdown(dtype, condition):
    x, info = solve(np.diag(np.asarray([condition, 1.0], dtype)), np.ones(2, dtype))
    assert bool(info.converged)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, [1 / condition, 1.0], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "condition"), [(np.float32, 1e8), (np.float64, 1e17)])
def test_curvature_below_the_rounding_of_the_largest_is_a_breakdown(dtype, condition):
    for x0 in (None, np.zeros(2, dtype)):
        x, info = solve(np.diag(np.asarray([condition, 1.0], dtype)), np.ones(2, dtype), x0=x0)
        assert_failed(x, info)
        assert int(info.iterations) == 2
        np.testing.assert_allclose(x, np.full(2, 2 / condition), rtol=1e-6)


def test_singular_consistent_system_gives_the_minimum_norm_solution():
    matrix = symmetric([0.0] * 5 + list(np.linspace(1, 4, 15)))
    rhs = matrix @ vector(20)
    x, info = solve(matrix, rhs, tol=1e-10)
    assert bool(info.converged)
    assert not bool(info.breakdown)
    np.testing.assert_allclose(x, np.linalg.pinv(matrix, rcond=1e-8) @ rhs, rtol=1e-7)


def test_singular_inconsistent_system_breaks_down_at_the_null_direction():
    x, info = solve(np.diag([1.0, 1.0, 0.0]), np.ones(3))
    assert_failed(x, info)
    assert int(info.iterations) == 2
    np.testing.assert_array_equal(x, [1.5, 1.5, 1.5])


def test_random_singular_inconsistent_system_never_claims_success():
    for seed in range(5):
        matrix = symmetric([0.0] * 5 + list(np.linspace(1, 4, 15)), seed).astype(np.float32)
        x, info = solve(matrix, vector(20, seed, np.float32), tol=1e-6, maxiter=40)
        assert np.all(np.isfinite(x))
        assert not bool(info.converged)
        assert bool(info.breakdown) or int(info.iterations) == 40


@pytest.mark.parametrize("culprit", ["operator", "preconditioner"])
def test_non_finite_operator_keeps_the_last_good_iterate(culprit):
    """With a tridiagonal matrix and rhs = e_0, coordinate i is zero before step i: fail there."""
    matrix = 2 * jnp.eye(8) - 0.5 * jnp.eye(8, k=1) - 0.5 * jnp.eye(8, k=-1)

    @jax.jit
    def run(step, bad, maxiter):
        def spoil(v, name):
            return jnp.where((v[step] != 0) & (name == culprit), bad, v)

        operator, M = lambda v: matrix @ spoil(v, "operator"), lambda r: spoil(r, "preconditioner")
        return fvp.cg(operator, jnp.eye(8)[0], M=M, tol=0.0, maxiter=maxiter)

    for step in (0, 1, 4):
        expected, _ = solve(matrix, jnp.eye(8)[0], tol=0.0, maxiter=step)
        for bad in (np.nan, np.inf):
            x, info = run(step, bad, 8)
            assert_failed(x, info)
            assert int(info.iterations) == step + (culprit == "operator")
            np.testing.assert_allclose(x, expected, rtol=1e-13)


def test_large_rhs_without_a_step_has_a_zero_model():
    _, info = solve(np.eye(3, dtype=np.float32), np.full(3, 2.0**100, np.float32), maxiter=0)
    assert float(info.model_value) == float(info.curvature) == 0


def test_indefinite_preconditioner_is_reported():
    x, info = solve(np.diag([1.0, 2.0]), np.array([1.0, 1.0]), inverse=np.diag([1.0, -3.0]))
    assert_failed(x, info)


def test_preconditioner_that_turns_out_indefinite_is_reported():
    """It is positive along the right-hand side, and negative along the next residual."""
    x, info = solve(np.eye(2), np.array([1.0, 1.0]), inverse=np.diag([3.0, -1.0]))
    assert_failed(x, info)
    assert int(info.iterations) == 1
    np.testing.assert_allclose(x, np.array([3.0, -1.0]) * 2 / 10, rtol=1e-13)


def test_preconditioner_that_overflows_is_reported_before_another_product():
    M = lambda r: jnp.where(r[0] == r[1], r, jnp.inf * jnp.sign(r))
    x, info = jax.jit(lambda b: fvp.cg(lambda v: jnp.array([1.0, 2.0]) * v, b, M=M))(jnp.ones(2))
    assert_failed(x, info)
    assert int(info.iterations) == 1
    np.testing.assert_allclose(x, np.full(2, 2 / 3), rtol=1e-14)


@pytest.mark.parametrize("first_row", [[1.0, 1e25], [1e-10, 1e30]], ids=["squared", "itself"])
def test_residual_beyond_the_dtype_leaves_the_record_of_the_last_good_iterate(first_row):
    """The residual after one step, or its square, overflows."""
    matrix = np.array([first_row, [first_row[1], 3e38]], np.float32)
    x, info = solve(matrix, np.array([1, 0], np.float32))
    assert_failed(x, info)
    np.testing.assert_array_equal(x, np.zeros(2))
    assert float(info.residual_norm) == 1
    assert float(info.model_value) == float(info.curvature) == 0


def test_solution_beyond_the_dtype_is_reported_not_returned():
    x, info = solve(np.full((1, 1), 2.0**-60, np.float32), np.full(1, 2.0**100, np.float32))
    assert_failed(x, info)


# Pytrees and dtypes ------------------------------------------------------------------------------


def test_none_leaves_pass_through():
    rhs = {"a": jnp.arange(3.0), "b": None, "c": (None, jnp.ones((2, 2)))}
    x, info = fvp.cg(lambda v: jax.tree.map(lambda leaf: 4 * leaf, v), rhs)
    assert jax.tree.structure(x) == jax.tree.structure(rhs)
    jax.tree.map(np.testing.assert_array_equal, x, jax.tree.map(lambda leaf: leaf / 4, rhs))
    assert bool(info.converged)


@pytest.mark.parametrize(("promotes", "warm"), [(False, True), (True, False)])
def test_mixed_dtype_tree_solves_to_its_coarsest_dtype(promotes, warm):
    """Also when the operator returns wider leaves than it was given."""
    shapes = {"b": ((4,), jnp.bfloat16), "s": ((), jnp.float16), "w": ((3, 4), jnp.float32)}
    matrix = symmetric(np.linspace(1, 4, 17))
    dtypes = {name: dtype for name, (_, dtype) in shapes.items()}

    def split(flat):
        pieces = dict(zip(shapes, jnp.split(flat, [4, 5]), strict=True))
        return {name: pieces[name].reshape(shapes[name][0]) for name in shapes}

    def join(tree):
        return jnp.concatenate(
            [jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
        )

    def cast(tree):
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), tree, dtypes)

    def operator(v):
        assert jax.tree.map(lambda leaf: leaf.dtype, v) == jax.tree.map(jnp.dtype, dtypes)
        product = split(jnp.asarray(matrix, jnp.float32) @ join(v))
        return product if promotes else cast(product)

    rhs = cast(split(jnp.asarray(vector(17), jnp.float32)))
    x0 = rhs if warm else None
    x, info = jax.jit(lambda b, x0: fvp.cg(operator, b, x0=x0, tol=1e-2))(rhs, x0)
    assert jax.tree.map(lambda leaf: leaf.dtype, x) == jax.tree.map(jnp.dtype, dtypes)
    expected = np.linalg.solve(matrix, np.asarray(join(rhs), np.float64))
    assert np.linalg.norm(join(x) - expected) <= 2e-2 * np.linalg.norm(expected)
    assert bool(info.converged)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inner_products_accumulate_in_float32(dtype):
    """4096 entries near 100: b.b overflows float16 and loses two digits in bfloat16."""
    size = 4096
    rhs = (100 * jnp.asarray(vector(size))).astype(dtype)
    diagonal = jnp.asarray([1, 2, 4, 8], dtype)[jnp.arange(size) % 4]
    run = jax.jit(lambda b, maxiter: fvp.cg(lambda v: diagonal * v, b, tol=1e-2, maxiter=maxiter))
    exact = np.asarray(rhs, np.float64)
    _, start = run(rhs, 0)
    np.testing.assert_allclose(start.residual_norm, np.linalg.norm(exact), rtol=1e-6)
    x, info = run(rhs, 20)
    assert bool(info.converged)
    assert int(info.iterations) <= 5
    assert x.dtype == dtype
    expected = exact / np.asarray(diagonal, np.float64)
    assert np.linalg.norm(np.asarray(x, np.float64) - expected) <= 1e-2 * np.linalg.norm(expected)


@ON_CPU
def test_length_of_a_step_along_a_rounded_direction_is_exact():
    """A bfloat16 direction is not orthogonal to the others; products with powers of 2 are exact."""
    diagonal = 2.0 ** np.arange(5)
    rounded = lambda v: np.asarray(jnp.asarray(v).astype(jnp.bfloat16), np.float64)
    rhs = rounded(vector(5))
    x, r, p, beta = np.zeros(5), rhs, np.zeros(5), 0.0
    for _ in range(4):
        p = rounded(r + beta * p)
        alpha = p @ r / (p @ (diagonal * p))
        x, before = x + alpha * p, r @ r
        r = r - alpha * diagonal * p
        beta = r @ r / before
    operator = lambda v: jnp.asarray(diagonal, v.dtype) * v
    _, info = fvp.cg(operator, jnp.asarray(rhs, jnp.bfloat16), tol=0.0, maxiter=4)
    value = 0.5 * x @ (diagonal * x) - rhs @ x
    np.testing.assert_allclose(info.model_value, value, rtol=1e-6)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(r), rtol=1e-4)


def test_strict_dtype_promotion_is_respected():
    matrix = jnp.asarray(MATRICES["well_conditioned"], jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        x, info = fvp.cg(
            lambda v: matrix @ v, jnp.ones(40, jnp.float32), damping=0.1, progress_tol=1e-6
        )
    assert x.dtype == jnp.float32
    assert bool(info.converged)


def test_leaves_sharded_over_an_explicit_mesh_are_solved():
    """On explicit mesh axes vdot and reshape(-1) of a sharded leaf raise."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
        rhs = jax.device_put(jnp.arange(1.0, 7.0).reshape(2, 3), sharding)
        scale = jax.device_put(jnp.asarray([[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]), sharding)
        x, info = jax.jit(lambda b, x0: fvp.cg(lambda v: scale * v, b, x0=x0))(
            rhs, jnp.zeros_like(rhs)
        )
        assert jax.typeof(x) == jax.typeof(rhs)
        assert bool(info.converged)
        np.testing.assert_allclose(x, rhs / scale, rtol=1e-12)


# Transformations ---------------------------------------------------------------------------------


def test_vmap_over_rhs_equals_a_loop_also_when_lanes_stop_apart():
    """Lane i excites i + 1 eigenvalues; the last lanes are zero and non-finite."""
    diagonal = jnp.asarray([1.0, 3.0, 7.0, 15.0])
    rhs = jnp.concatenate(
        [jnp.tril(jnp.ones((4, 4))), jnp.zeros((1, 4)), jnp.full((1, 4), jnp.nan)]
    )
    run = jax.jit(lambda b: fvp.cg(lambda v: diagonal * v, b, tol=1e-10))
    x, info = jax.vmap(run)(rhs)
    assert info.iterations.tolist() == [1, 2, 3, 4, 0, 0]
    for i in range(len(rhs)):
        x_i, info_i = run(rhs[i])
        np.testing.assert_allclose(x[i], x_i, rtol=1e-12, atol=1e-14)
        for lane, single in zip(jax.tree.leaves(info), jax.tree.leaves(info_i), strict=True):
            np.testing.assert_allclose(lane[i], single, rtol=1e-10, atol=1e-12)


def test_vmap_over_matrices_and_damping_equals_a_loop():
    matrices = np.stack(
        [symmetric(np.linspace(1, top, 6), seed) for seed, top in enumerate((2, 9, 90))]
    )
    dampings, rhs = np.array([0.0, 0.5, 2.0]), vector(6)
    x, _ = jax.vmap(lambda A, damping: solve(A, rhs, damping=damping, tol=1e-12))(
        matrices, dampings
    )
    for i in range(3):
        np.testing.assert_allclose(
            x[i], np.linalg.solve(matrices[i] + dampings[i] * np.eye(6), rhs), rtol=1e-10
        )


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.2, "tol": 1e-9},
        {"tol": 0.0, "maxiter": 7},
        {"tol": 0.0, "progress_tol": 1e-4},
        {"atol": 1e-2},
    ],
)
def test_static_and_traced_options_agree(options):
    """Every other test passes them traced, through the jitted `solve`."""
    matrix, rhs = MATRICES["well_conditioned"], vector(40)
    x, info = jax.jit(lambda b: fvp.cg(lambda v: matrix @ v, b, **options))(rhs)
    expected, traced = solve(matrix, rhs, **options)
    assert int(info.iterations) == int(traced.iterations) > 0
    np.testing.assert_allclose(x, expected, rtol=1e-10)


def test_limit_may_be_an_array_that_is_not_traced():
    matrix, maxiter = MATRICES["well_conditioned"], jnp.asarray(3)
    run = jax.jit(lambda b: fvp.cg(lambda v: matrix @ v, b, tol=0.0, maxiter=maxiter)[1])
    assert int(run(vector(40)).iterations) == 3


def test_operator_may_close_over_what_vmap_maps():
    scales = jnp.asarray([1.0, 2.0, 4.0])
    x = jax.vmap(lambda scale: fvp.cg(lambda v: scale * v, jnp.ones(3))[0])(scales)
    np.testing.assert_array_equal(x, 1 / scales[:, None] * jnp.ones(3))


def test_operator_is_read_anew_by_every_eager_call():
    """The same function object over changed state is another matrix."""
    state = {"scale": jnp.asarray(1.0)}

    def operator(v):
        return state["scale"] * v

    for scale in (1.0, 2.0):
        state["scale"] = jnp.asarray(scale)
        np.testing.assert_array_equal(fvp.cg(operator, jnp.ones(3))[0], jnp.ones(3) / scale)


def test_preconditioner_is_read_anew_by_every_eager_call_too():
    """Also where the operator is a pytree of arrays alone, which is compiled once."""
    F = fvp.fisher(lambda w, x: x * w, fvp.Gaussian(), jnp.ones(3), jnp.ones((1, 3)))
    state = {}
    M = lambda r: state["scale"] * r
    for scale in (1.0, -1.0):
        state["scale"] = scale
        assert bool(fvp.cg(F, jnp.ones(3), M=M)[1].breakdown) == (scale < 0)


@jax.tree_util.register_static
class WithForm:
    """D v and v^T D v at once, with entries 1, 2, 3, ... of the diagonal D."""

    def mv(self, v):
        raise AssertionError("the form would cost a pass over memory more")

    def mv_and_form(self, v):
        product = jnp.arange(1, v.size + 1, dtype=v.dtype) * v
        return product, jnp.sum(v.astype(jnp.float32) * product.astype(jnp.float32))


def test_operator_with_a_form_is_multiplied_by_that():
    """And its product is widened like any other."""
    rhs, operator = jnp.asarray(vector(8), jnp.bfloat16), WithForm()
    x, info = fvp.cg(operator, rhs, damping=0.3, tol=0.0, maxiter=3)
    expected, other = fvp.cg(
        lambda v: operator.mv_and_form(v)[0], rhs, damping=0.3, tol=0.0, maxiter=3
    )
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_allclose(info.residual_norm, other.residual_norm, rtol=1e-5)


def test_scan_carries_the_solution_as_the_next_start():
    matrix = jnp.asarray(MATRICES["well_conditioned"], jnp.float32)
    rhs = jnp.asarray(vector(40), jnp.float32)

    def step(x0, scale):
        x, info = fvp.cg(lambda v: matrix @ v, scale * rhs, x0=x0)
        return x, info.iterations

    x, iterations = jax.lax.scan(
        step, jnp.zeros_like(rhs), jnp.asarray([1.0, 1.0, 2.0], jnp.float32)
    )
    assert iterations[0] > 5
    assert iterations[1] == 0
    assert iterations[2] > 5
    np.testing.assert_allclose(x, np.linalg.solve(MATRICES["well_conditioned"], 2 * rhs), rtol=1e-3)


def count_traces(execute, dtype=jnp.float32, x0=None, **options):
    calls = {"operator": 0, "M": 0}

    def counted(name):
        def apply(v):
            calls[name] += 1
            return 2 * v

        return apply

    def run(rhs):
        return fvp.cg(counted("operator"), rhs, M=counted("M"), x0=x0, damping=0.1, **options)

    execute(run, jnp.ones(3, dtype))
    return calls


@pytest.mark.parametrize("progress_tol", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_operator_is_traced_once(dtype, progress_tol):
    """In the loop body; without a start the preconditioner also before it."""
    options = {"dtype": dtype, "progress_tol": progress_tol, "maxiter": 5}
    calls = count_traces(jax.eval_shape, **options)
    assert calls["operator"] == 1
    assert calls["M"] <= 2
    calls = count_traces(jax.eval_shape, x0=jnp.ones(3, dtype), **options)
    assert calls["operator"] <= 2
    assert calls["M"] == 1


def test_operator_is_traced_once_when_called_eagerly():
    assert count_traces(lambda run, rhs: run(rhs))["operator"] == 1


def test_one_product_per_iteration_and_one_more_for_a_start():
    products = []

    def operator(v):
        jax.debug.callback(lambda: products.append(None))
        return jnp.asarray(MATRICES["well_conditioned"]) @ v

    for x0, extra in [(None, 0), (vector(40, 2), 1), (1e6 * vector(40, 2), 1)]:
        products.clear()
        _, info = jax.jit(lambda b, x0=x0: fvp.cg(operator, b, x0=x0))(vector(40))
        jax.effects_barrier()
        assert len(products) == int(info.iterations) + extra


def test_a_check_of_the_residual_costs_one_product_where_rounding_could_matter():
    products = []

    def operator(v):
        jax.debug.callback(lambda: products.append(None))
        return jnp.asarray(MATRICES["well_conditioned"], v.dtype) @ v

    run = jax.jit(lambda b, tol: fvp.cg(operator, b, tol=tol)[1])
    for dtype, tol, extra in (
        (jnp.float32, 1e-2, 0),
        (jnp.float32, 1e-5, 1),
        (jnp.float64, 1e-5, 0),
    ):
        products.clear()
        info = run(jnp.asarray(vector(40), dtype), tol)
        jax.effects_barrier()
        assert bool(info.converged)
        assert len(products) == int(info.iterations) + extra


# Errors ------------------------------------------------------------------------------------------

ONES = np.ones(3)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "rhs", lambda: fvp.cg(lambda v: v, jnp.arange(3))),
        (TypeError, "operator", lambda: fvp.cg(3.0, ONES)),
        (ValueError, "operator", lambda: fvp.cg(lambda v: v[:2], ONES)),
        (ValueError, "operator", lambda: fvp.cg(lambda v: (v, v), ONES)),
        (ValueError, "operator", lambda: fvp.cg(lambda v: v[:, None] * v, ONES)),
        (ValueError, "M", lambda: fvp.cg(lambda v: v, ONES, M=lambda v: v[:2])),
        (ValueError, "x0", lambda: fvp.cg(lambda v: v, ONES, x0=np.ones(2))),
        (ValueError, "x0", lambda: fvp.cg(lambda v: v, ONES, x0={"a": ONES})),
        (ValueError, "maxiter", lambda: fvp.cg(lambda v: v, ONES, maxiter=-1)),
        (ValueError, "maxiter", lambda: fvp.cg(lambda v: v, ONES, maxiter=2.5)),
        (ValueError, "damping", lambda: fvp.cg(lambda v: v, ONES, damping=-1e-3)),
        (ValueError, "damping", lambda: fvp.cg(lambda v: v, ONES, damping=jnp.nan)),
        (ValueError, "damping", lambda: fvp.cg(lambda v: v, ONES, damping=jnp.asarray(jnp.inf))),
        (TypeError, "damping", lambda: fvp.cg(lambda v: v, ONES, damping="lm")),
        (ValueError, "tol", lambda: fvp.cg(lambda v: v, ONES, tol=-1e-3)),
        (ValueError, "atol", lambda: fvp.cg(lambda v: v, ONES, atol=np.float32(-1))),
        (ValueError, "progress_tol", lambda: fvp.cg(lambda v: v, ONES, progress_tol=jnp.nan)),
    ],
)
def test_wrong_input_raises_and_names_the_argument(error, words, call):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call()


def test_wrong_input_raises_at_trace_time_too():
    with pytest.raises(ValueError, match="operator"):
        jax.eval_shape(
            lambda b: fvp.cg(lambda v: v[:2], b), jax.ShapeDtypeStruct((3,), jnp.float32)
        )
