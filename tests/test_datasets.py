"""Means over batches equal what one batch of all examples gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, product_matrix, relative_error

import fvp

COMPILE_QUICKLY = True

CASE, MODEL, KEY = CASES["softmax"], mlp((3,)), jax.random.key(0)
RNG = np.random.default_rng(0)
PARAMS = parameters(RNG, 3)
V = parameters(RNG, 3)
DATA = {
    "x": jnp.asarray(RNG.normal(size=(11, 2))),
    "y": CASE.targets(RNG, (11,)),
    "w": jnp.asarray(RNG.uniform(0.5, 2, 11)).at[8:].set(0),
}
# The last batch is shorter, and has no weight at all.
BATCHES = [jax.tree.map(lambda x, i=i: x[i : i + 4], DATA) for i in (0, 4, 8)]


def builder(build, curvature, weighted):
    def operator(batch):
        options = {"weights": batch["w"]} if weighted else {}
        return build(curvature, MODEL, CASE.head, PARAMS, batch["x"], batch["y"], KEY, **options)

    return operator


@pytest.mark.each_value
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("curvature", ["fisher", "hessian", "empirical_fisher"])
def test_products_equal_those_of_one_batch(build, curvature, weighted):
    operator = builder(build, curvature, weighted)
    F, whole = fvp.dataset_operator(operator, BATCHES), operator(DATA)
    for _ in range(2):  # the batches are read again
        assert relative_error(F @ V, whole @ V) < 1e-10
    product, form = F.mv_and_form(V)
    assert relative_error(product, whole @ V) < 1e-10
    np.testing.assert_allclose(form, whole.quadratic_form(V), rtol=1e-10)
    np.testing.assert_allclose(F.quadratic_form(V), whole.quadratic_form(V), rtol=1e-10)
    assert F.like == whole.like


def test_the_batches_may_change_between_products(build):
    batches = BATCHES[:1]
    operator = builder(build, "fisher", False)
    F = fvp.dataset_operator(operator, batches)
    fvp.cg(F, V, damping=0.1)
    batches.extend(BATCHES[1:])
    expected, _ = fvp.cg(operator(DATA), V, damping=0.1, tol=1e-12)
    assert relative_error(fvp.cg(F, V, damping=0.1, tol=1e-12)[0], expected) < 1e-8


def test_scipy_solves_and_finds_eigenvalues(build):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = builder(build, "fisher", True)
    A = fvp.interop.as_scipy(fvp.dataset_operator(operator, BATCHES))
    matrix = product_matrix(operator(DATA))
    values = linalg.eigsh(A, 2, return_eigenvectors=False)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[-2:], rtol=1e-8)


def test_batches_without_weight_alone_give_zero(build):
    F = fvp.dataset_operator(builder(build, "fisher", True), BATCHES[2:])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(F @ V))


def test_the_diagonal_over_batches():
    diagonal = lambda batch: fvp.fisher_diagonal(MODEL, CASE.head, PARAMS, batch["x"])
    mean = fvp.mean_over_batches(diagonal, iter(BATCHES))
    assert relative_error(mean, diagonal(DATA)) < 1e-10


def test_weighted_factors_over_batches():
    def factors(batch):
        return fvp.kfac(MODEL, CASE.head, PARAMS, batch["x"], weights=batch["w"])

    K = fvp.mean_over_batches(factors, BATCHES, weight=lambda batch: batch["w"].sum())
    assert relative_error(K, factors(DATA)) < 1e-10
    assert relative_error(K.solve(V, 0.1), factors(DATA).solve(V, 0.1)) < 1e-10


def test_sums_are_in_single_precision_for_half():
    mean = fvp.mean_over_batches(lambda x: x[0], [jnp.ones((1, 2), jnp.bfloat16)] * 1000)
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean, 1)


def test_a_bar_is_shown_only_if_asked_for(build, capsys):
    pytest.importorskip("tqdm")
    operator = builder(build, "fisher", False)
    fvp.dataset_operator(operator, BATCHES) @ V
    assert capsys.readouterr().err == ""
    fvp.dataset_operator(operator, BATCHES, progress=True) @ V
    assert "batches: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fvp.dataset_operator(None, iter(BATCHES)), TypeError, "batches: expected an iter"),
        (lambda: fvp.dataset_operator(lambda x: x, [1.0]) @ V, TypeError, "build: expected"),
        (lambda: fvp.dataset_operator(lambda x: x, []) @ V, ValueError, "batches: expected at"),
        (lambda: fvp.dataset_operator(lambda x: x, []).like, ValueError, "batches: expected at"),
        (lambda: fvp.mean_over_batches(lambda x: x, []), ValueError, "batches: expected at"),
        (lambda: fvp.mean_over_batches(lambda x: x, [1.0]), ValueError, "pass weight="),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
