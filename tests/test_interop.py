"""Operators seen from lineax, SciPy and matfree: the dense matrix, solves and eigenvalues."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

CASE = CASES["softmax"]
MODEL, DAMPING = mlp((3,)), 1e-2


def operator(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 2)), dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), parameters(rng, CASE.size))
    return fvp.fisher(MODEL, CASE.head, params, x)


def columns(matvec, size):
    return np.stack([matvec(e) for e in np.eye(size)], axis=1)


def test_scipy_multiplies_by_the_dense_matrix():
    pytest.importorskip("scipy")
    F = operator()
    A = fvp.interop.as_scipy(F)
    assert A.shape == F.dense().shape
    assert A.dtype == np.float64
    assert relative_error(columns(A.matvec, A.shape[0]), F.dense()) < 1e-12
    assert relative_error(A.T @ np.eye(A.shape[0]), F.dense()) < 1e-12


def test_scipy_finds_the_largest_eigenvalues():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    F = operator()
    found = linalg.eigsh(fvp.interop.as_scipy(F), 5, return_eigenvectors=False)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(F.dense())[-5:], rtol=1e-6)


def test_scipy_keeps_single_precision():
    pytest.importorskip("scipy")
    A = fvp.interop.as_scipy(operator(jnp.float32))
    assert A.dtype == np.float32
    assert (A @ np.ones(A.shape[0])).dtype == np.float32


def test_half_precision_is_multiplied_in_single():
    matvec, like = fvp.interop.as_matfree(operator(jnp.bfloat16))
    assert like.dtype == matvec(like).dtype == jnp.float32


def test_mixed_dtypes_take_the_widest():
    F = fvp.fisher(
        lambda p, x: x @ p["a"].astype(jnp.float64) + p["b"],
        fvp.Gaussian(),
        {"a": jnp.ones((2, 1), jnp.float32), "b": jnp.zeros(1)},
        jnp.eye(2),
    )
    matvec, like = fvp.interop.as_matfree(F)
    assert like.dtype == jnp.float64
    assert relative_error(columns(matvec, 3), F.dense()) < 1e-6


@pytest.mark.parametrize("jit", [False, True])
def test_lineax_solves(jit):
    lineax = pytest.importorskip("lineax")
    F = operator()
    rhs = jnp.arange(1.0, 1 + len(F.dense()))

    def solve(F, rhs):
        A = fvp.interop.as_lineax(lambda v: jax.tree.map(add_damping, F @ v, v), like=F.like)
        assert lineax.is_symmetric(A)
        assert lineax.is_positive_semidefinite(A)
        return lineax.linear_solve(A, rhs, lineax.CG(rtol=1e-12, atol=1e-12)).value

    add_damping = lambda Fv, v: Fv + DAMPING * v
    solution = (jax.jit(solve) if jit else solve)(F, rhs)
    expected = jnp.linalg.solve(F.dense() + DAMPING * jnp.eye(rhs.size), rhs)
    assert relative_error(solution, expected) < 1e-8


def test_lineax_materialises_the_dense_matrix_of_an_indefinite_one():
    lineax = pytest.importorskip("lineax")
    rng = np.random.default_rng(0)
    x, params = jnp.asarray(rng.normal(size=(6, 2))), parameters(rng, CASE.size)
    H = fvp.hessian(MODEL, CASE.head, params, x, CASE.targets(rng, (6,)))
    A = fvp.interop.as_lineax(H, positive_semidefinite=False)
    assert lineax.is_symmetric(A)
    assert not lineax.is_positive_semidefinite(A)
    assert relative_error(A.as_matrix(), H.dense()) < 1e-12


def test_matfree_takes_the_product_and_the_vector():
    pytest.importorskip("matfree")
    from matfree import decomp, funm, stochtrace

    F = operator()
    matvec, like = fvp.interop.as_matfree(F)
    damped = lambda v: matvec(v) + DAMPING * v
    integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(like.size))
    sampler = lambda key: jnp.sqrt(like.size) * jnp.eye(like.size)  # exact: no noise in the trace
    estimate = stochtrace.estimator_monte_carlo(integrand, sampler)
    expected = jnp.linalg.slogdet(F.dense() + DAMPING * jnp.eye(like.size))[1]
    np.testing.assert_allclose(estimate(damped, jax.random.key(0)), expected, rtol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_kronecker_factors_know_their_vectors(inverse):
    rng = np.random.default_rng(0)
    params, x = parameters(rng, 3), jnp.asarray(rng.normal(size=(5, 2)))
    K = fvp.kfac(MODEL, CASE.head, params, x)
    matvec, like = fvp.interop.as_matfree(K.inverse(DAMPING) if inverse else K)
    expected = K.dense() + DAMPING * jnp.eye(like.size) if inverse else K.dense()
    expected = jnp.linalg.inv(expected) if inverse else expected
    assert relative_error(columns(matvec, like.size), expected) < 1e-10


def test_a_vector_becomes_a_tree_by_ravel_pytree():
    F = operator()
    matvec, like = fvp.interop.as_matfree(F)
    v, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), F.like))
    assert relative_error(unravel(matvec(v)), F @ unravel(like + 1)) < 1e-12


def test_a_callable_needs_like():
    with pytest.raises(TypeError, match="like: expected a tree"):
        fvp.interop.as_matfree(lambda v: v)


@pytest.mark.parametrize("operator", [3.0, None])
def test_what_cannot_be_called_is_refused(operator):
    with pytest.raises(TypeError, match="operator: expected"):
        fvp.interop.as_matfree(operator, like=jnp.zeros(2))


def test_an_empty_tree_is_refused():
    with pytest.raises(ValueError, match="like: expected at least one number"):
        fvp.interop.as_matfree(lambda v: v, like=jnp.zeros(0))


def test_a_product_of_another_shape_is_refused():
    matvec, like = fvp.interop.as_matfree(lambda v: v[:1], like=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"operator\(v\): expected shape"):
        matvec(like)


def test_importing_fvp_imports_no_optional_package():
    program = (
        "import sys, fvp, fvp.interop;"
        "print([m for m in ('flax', 'lineax', 'scipy.sparse.linalg', 'matfree', 'tqdm')"
        " if m in sys.modules and m not in before])"
    )
    program = f"import sys, jax, optax; before = set(sys.modules); {program}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
