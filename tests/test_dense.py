"""The dense matrix by rows, against products with unit vectors, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import product_matrix, quick_jit, rarely, relative_error
from jax.flatten_util import ravel_pytree
from models import MODELS

import fvp
from fvp.layers import dense

COMPILE_QUICKLY = True

CURVATURES = ("fisher", "ggn", "empirical_fisher", "mc_fisher")


def count_products(monkeypatch):
    """A list that grows with every product that is traced."""
    calls, product = [], fvp.CurvatureOperator.mv
    counted = lambda operator, v: calls.append(None) or product(operator, v)
    monkeypatch.setattr(fvp.CurvatureOperator, "mv", counted)
    return calls


@pytest.mark.parametrize(
    ("name", "weighting", "by_rows"),
    [
        ("mlp", "some zero", True),
        rarely("mlp", "negative", True),
        ("transformer", "negative", True),
        ("cnn_with_batchnorm_in_training", "some zero", True),
        ("pde_residual", "some zero", True),
        ("mixture_of_experts", None, True),
        rarely("mlp_with_custom_vjp", None, True),
        rarely("rnn", "negative", True),
    ],
)
def test_rows_give_the_matrix_of_products(build, monkeypatch, name, weighting, by_rows):
    model_fn, params, batch = MODELS[name].make(np.random.default_rng(0))
    case, rng = MODELS[name].case, np.random.default_rng(1)
    axes = case.head.batch_shape(jax.eval_shape(model_fn, params, batch))
    targets = case.targets(rng, axes)
    weights = None if weighting is None else jnp.asarray(rng.uniform(0.2, 2.0, axes))
    if weighting is not None:
        first = (0,) * len(axes)
        weights = weights.at[first].multiply(0 if weighting == "some zero" else -0.3)

    def matrices(params, batch, weights, curvature):
        key = jax.random.key(0)
        F = build(curvature, model_fn, case.head, params, batch, targets, key, weights=weights)
        expected, calls = product_matrix(F), count_products(monkeypatch)
        found = F.dense()
        assert bool(calls) != by_rows
        monkeypatch.undo()
        return found, expected

    for curvature in CURVATURES if name == "mlp" else ("ggn",):
        run = quick_jit(functools.partial(matrices, curvature=curvature))
        assert relative_error(*run(params, batch, weights)) < 1e-11


def affine(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2))), "b": jnp.zeros(2)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))


def test_a_row_of_weight_zero_may_hold_anything():
    F = lambda x: fvp.fisher(affine, fvp.Softmax(), PARAMS, x, weights=jnp.array([1, 0, 2, 1, 1.0]))
    assert relative_error(F(X.at[1].set(jnp.nan)).dense(), F(X).dense()) < 1e-14


def test_no_weight_at_all_gives_zeros():
    F = fvp.fisher(affine, fvp.Softmax(), PARAMS, X, weights=jnp.zeros(5))
    np.testing.assert_array_equal(F.dense(), np.zeros((8, 8)))


def test_columns_come_a_few_at_a_time(monkeypatch):
    F = fvp.fisher(affine, fvp.Softmax(), PARAMS, X)
    expected = F.dense()
    monkeypatch.setattr(dense, "CHUNK", 1)
    jax.clear_caches()
    assert relative_error(F.dense(), expected) < 1e-14


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_dtype_is_that_of_the_parameters(dtype):
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    matrix = fvp.fisher(affine, fvp.Softmax(), cast(PARAMS), cast(X)).dense()
    assert matrix.dtype == dtype
    error = relative_error(matrix, fvp.fisher(affine, fvp.Softmax(), PARAMS, X).dense())
    assert error < 8 * jnp.finfo(dtype).eps


def test_a_pde_residual_costs_a_jacobian_and_a_product():
    """Of 257 parameters and 1,020 rows, as often as a hand-written J^T J by vmap(grad)."""
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 64), "b": (64,), "v": (64, 1), "c": (1,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    points = jnp.asarray(rng.uniform(size=(1020, 2)))
    flat, unravel = ravel_pytree(params)

    def model(params, points):
        u = lambda x: (jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"])[0]
        return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(points)[:, None]

    def by_hand(flat, points):
        residual = lambda flat, x: model(unravel(flat), x[None])[0, 0]
        rows = jax.vmap(jax.grad(residual), (None, 0))(flat, points)
        return rows.T @ rows / len(points)

    by_rows = lambda params, points: fvp.fisher(model, fvp.Gaussian(), params, points).dense()
    ours = jax.jit(by_rows).lower(params, points).compile()
    theirs = jax.jit(by_hand).lower(flat, points).compile()
    assert relative_error(ours(params, points), theirs(flat, points)) < 1e-12
    flops = lambda program: program.cost_analysis()["flops"]
    assert flops(ours) < 1.5 * flops(theirs)


def centred(params, x):
    """Rows meet in their mean."""
    z = affine(params, x)
    return z - z.mean(axis=0)


@pytest.mark.parametrize("chunk", [2**25, 1], ids=["by JVPs", "by products"])
def test_rows_that_layers_do_not_give(monkeypatch, chunk):
    F = fvp.fisher(centred, fvp.Gaussian(), PARAMS, X)
    calls = count_products(monkeypatch)
    monkeypatch.setattr(dense, "CHUNK", chunk)
    jax.clear_caches()
    matrix = F.dense()
    assert bool(calls) == (chunk == 1)
    assert relative_error(matrix, product_matrix(F)) < 1e-13
