"""Traces and eigenpairs from products, beside dense matrices of given spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

SIZE, KEY = 120, jax.random.key(0)
LIKE = {"a": jnp.zeros((SIZE // 4, 3)), "b": jnp.zeros(SIZE - SIZE // 4 * 3)}
SPECTRA = {
    "decaying": 1 / np.arange(1, SIZE + 1) ** 2,
    "flat": np.linspace(1, 2, SIZE),
    "equal": np.ones(SIZE),
    "of multiplicity 6": np.repeat(np.arange(SIZE // 6), 6),
    "of low rank": np.r_[3.0, 2.0, 2.0, np.zeros(SIZE - 3)],
    "zero": np.zeros(SIZE),
    "indefinite": np.linspace(-3, 1, SIZE),
    "negative": -np.arange(1.0, SIZE + 1),
    "tiny": 1e-200 / np.arange(1, SIZE + 1) ** 2,
}

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


def matrix_of(spectrum, dtype=jnp.float64):
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
    return jnp.asarray(basis * spectrum @ basis.T, dtype)


def operator_of(matrix):
    # A pytree, so that it is compiled once for all spectra.
    return jax.tree_util.Partial(multiply, matrix)


def multiply(matrix, v):
    flat, unravel = ravel_pytree(v)
    return unravel(matrix @ flat)


def fisher(outputs=3, examples=8):
    rng = np.random.default_rng(0)
    x, params = jnp.asarray(rng.normal(size=(examples, 2))), parameters(rng, outputs)
    return fvp.fisher(mlp((outputs,)), CASES["softmax"].head, params, x)


# --- The trace --------------------------------------------------------------------------------


@every_spectrum
def test_trace_is_exact_from_as_many_products_as_parameters(spectrum):
    A = operator_of(matrix_of(spectrum))
    for number in (SIZE, SIZE + 7):
        actual = fvp.trace(A, KEY, number, like=LIKE)
        np.testing.assert_allclose(actual, spectrum.sum(), rtol=1e-12, atol=1e-13)


@quick_jit
def hundred_traces(matrix):
    estimate = lambda key: fvp.trace(operator_of(matrix), key, 20, like=LIKE)
    return jax.lax.map(estimate, jax.random.split(KEY, 100))


@every_spectrum
def test_trace_is_unbiased(spectrum):
    """Of 100 estimates from 20 products each; the bound was fixed beforehand."""
    scale = np.abs(spectrum).sum() or 1
    errors = (np.asarray(hundred_traces(matrix_of(spectrum))) - spectrum.sum()) / scale
    assert abs(errors.mean()) <= 4 * errors.std(ddof=1) / 10 + 1e-13
    assert np.abs(errors).max() <= 0.2


def test_trace_beats_the_average_of_quadratic_forms_where_the_spectrum_decays():
    spectrum = SPECTRA["decaying"]
    A = operator_of(matrix_of(spectrum))
    errors = [fvp.trace(A, jax.random.key(i), 40, like=LIKE) - spectrum.sum() for i in range(10)]
    hutchinson = np.sqrt(2 * np.sum(spectrum**2) / 40)  # its standard deviation
    assert np.sqrt(np.mean(np.square(errors))) < 0.05 * hutchinson


def test_trace_of_less_than_full_rank_is_exact_from_twice_the_rank_and_two():
    spectrum = SPECTRA["of low rank"]
    A = operator_of(matrix_of(spectrum))
    assert abs(fvp.trace(A, KEY, 8, like=LIKE) - spectrum.sum()) < 1e-12


@pytest.mark.parametrize("number", [2, 3, 11])
def test_trace_spends_no_more_products(number):
    count = 0

    def product(v):
        nonlocal count
        count += 1
        return v

    with jax.disable_jit():
        fvp.trace(product, KEY, number, like=jnp.zeros(20))
    assert count <= number


def test_trace_of_a_fisher_is_that_of_its_diagonal():
    F = fisher()
    problem = F.problem
    diagonal = fvp.fisher_diagonal(mlp((3,)), problem.head, problem.params, problem.batch)
    expected = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(diagonal))
    np.testing.assert_allclose(fvp.trace(F, KEY, 1000), expected, rtol=1e-12)
    np.testing.assert_allclose(fvp.trace(F, KEY, 20), expected, rtol=0.1)


def test_trace_of_the_digits_network_from_100_products():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = jnp.asarray(digits.data[:300] / 16, jnp.float32)
    rng = np.random.default_rng(0)
    weight = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
    params = [weight(64, 32), jnp.zeros(32), weight(32, 10), jnp.zeros(10)]
    model = lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3]
    F = fvp.fisher(model, fvp.Softmax(), params, x)
    diagonal = fvp.fisher_diagonal(model, fvp.Softmax(), params, x)
    expected = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(diagonal))
    assert abs(fvp.trace(F, KEY, 100) - expected) < 0.01 * expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trace_and_eigenvalues_are_at_least_in_single_precision(dtype):
    A = lambda v: jax.tree.map(lambda x: 2 * x, v)
    like = jax.tree.map(lambda x: x.astype(dtype), LIKE)
    estimate, (values, vectors) = (
        fvp.trace(A, KEY, 10, like=like),
        fvp.eigenpairs(A, 2, KEY, like=like),
    )
    assert {estimate.dtype, values.dtype, vectors["a"].dtype} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(estimate, 2 * SIZE, rtol=1e-2)
    np.testing.assert_allclose(values, 2, rtol=1e-2)


# --- Eigenpairs -------------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize("k", [1, 5])
def test_eigenpairs_equal_the_dense_ones(spectrum, k):
    matrix = matrix_of(spectrum)
    values, vectors = fvp.eigenpairs(operator_of(matrix), k, KEY, like=LIKE)
    largest = np.abs(spectrum).max()
    expected = np.sort(spectrum)[::-1][:k]
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-11 * largest)
    assert jax.tree.structure(vectors) == jax.tree.structure(LIKE)
    rows = jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=1e-12)
    residuals = jnp.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1)
    assert residuals.max() <= 2e-8 * largest


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_eigenpairs_of_a_network(build, curvature):
    case, rng = CASES["softmax"], np.random.default_rng(0)
    params, x = parameters(rng, 3), jnp.asarray(rng.normal(size=(9, 2)))
    F = build(curvature, mlp((3,)), case.head, params, x, case.targets(rng, (9,)), KEY)
    values, vectors = jax.jit(lambda F: fvp.eigenpairs(F, 4, KEY))(F)
    expected = jnp.linalg.eigvalsh(F.dense())[::-1][:4]
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    products = jax.vmap(F.mv)(vectors)
    scaled = jax.tree.map(lambda v: jnp.einsum("k,k...->k...", values, v), vectors)
    assert relative_error(products, scaled) < 1e-7


def test_every_copy_of_the_eigenvalues_of_independent_outputs_is_found():
    """A linear model with 6 Gaussian outputs: every eigenvalue of X^T X occurs 6 times."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 40)))
    F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((40, 6)), x)
    values, _ = fvp.eigenpairs(F, 12, KEY)
    largest = np.linalg.svd(x, compute_uv=False)[:2] ** 2 / 50
    np.testing.assert_allclose(values, np.repeat(largest, 6), rtol=1e-9)


def test_all_eigenpairs_of_a_small_operator():
    values, vectors = fvp.eigenpairs(lambda v: jnp.array([2.0, 3.0]) * v, 2, KEY, like=jnp.zeros(2))
    np.testing.assert_allclose(values, [3, 2], rtol=1e-12)
    np.testing.assert_allclose(np.abs(vectors), [[0, 1], [1, 0]], atol=1e-12)


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: fvp.trace(A, KEY, 1, like=LIKE), ValueError, "num_products: expected 2 or more"),
        (lambda A: fvp.trace(A, KEY, 2.0, like=LIKE), TypeError, "num_products: expected a Python"),
        (lambda A: fvp.trace(A, KEY, 10), TypeError, "like: expected a tree"),
        (lambda A: fvp.trace(3, KEY, 10, like=LIKE), TypeError, "operator: expected"),
        (lambda A: fvp.eigenpairs(A, 0, KEY, like=LIKE), ValueError, "k: expected 1 or more"),
        (lambda A: fvp.eigenpairs(A, 121, KEY, like=LIKE), ValueError, "k: expected at most the"),
        (lambda A: fvp.eigenpairs(A, 1, KEY), TypeError, "like: expected a tree"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda v: v)
