"""The diagonal by layer rules equals the diagonal of the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import each_kind_of_case, mlp, parameters, product_matrix, reference, relative_error
from jax.flatten_util import ravel_pytree
from models import MODELS
from test_models import dense, every_model, problem

import fvp

COMPILE_QUICKLY = True

MIXING = {
    "mixture_of_experts": "sort",
    "cnn_with_batchnorm_in_training": "reduce_sum",
    "nnx_cnn_in_training": "reduce_sum",
    "linen_cnn_in_training": "reduce_sum",
}


@every_model
def test_equals_the_dense_diagonal(name):
    model_fn, params, batch, _, weights = problem(name)
    head = MODELS[name].case.head
    _, expected = dense(name)
    options = {"fallback": "per_example"} if name in MIXING else {}
    actual = fvp.fisher_diagonal(model_fn, head, params, batch, weights=weights, **options)
    assert jax.tree.structure(actual) == jax.tree.structure(params)
    assert relative_error(ravel_pytree(actual)[0], jnp.diagonal(expected["fisher"])) < 1e-9


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_examples_say_where(name):
    model_fn, params, batch, _, _ = problem(name)
    with pytest.raises(ValueError, match=MIXING[name]):
        fvp.fisher_diagonal(model_fn, MODELS[name].case.head, params, batch)


@each_kind_of_case
def test_every_head(case):
    rng = np.random.default_rng(0)
    model_fn, params = mlp(case.event_shape), parameters(rng, case.size)
    x = jnp.asarray(rng.normal(size=(3, 2, 2)))
    weights = jnp.asarray(rng.uniform(size=(3, 2))).at[0, 1].set(0)
    expected = reference(case, model_fn, params, x, case.targets(rng, (3, 2)), weights)
    x = x.at[0, 1].set(jnp.inf)  # a row of weight zero is not there
    actual = fvp.fisher_diagonal(model_fn, case.head, params, x, weights=weights)
    assert relative_error(ravel_pytree(actual)[0], jnp.diagonal(expected["fisher"])) < 1e-9


def test_a_fallback_serves_what_has_no_rule():
    rng = np.random.default_rng(0)
    params = {"strange": jnp.asarray(0.3 * rng.normal(size=(3, 3))), "w": jnp.ones((3, 2))}
    model = lambda p, x: jnp.tanh(x @ jnp.sin(p["strange"])) @ p["w"]
    x, head = jnp.asarray(rng.normal(size=(5, 3))), fvp.Softmax()
    actual = fvp.fisher_diagonal(model, head, params, x, fallback="per_example")
    expected = jnp.diagonal(product_matrix(fvp.fisher(model, head, params, x)))
    assert relative_error(ravel_pytree(actual)[0], expected) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "rnn"])
def test_monte_carlo_is_unbiased(name):
    model_fn, params, batch, _, weights = problem(name)
    head = MODELS[name].case.head
    sample = lambda key: fvp.fisher_diagonal(
        model_fn, head, params, batch, weights=weights, key=key
    )
    flat = jax.jit(jax.vmap(lambda key: ravel_pytree(sample(key))[0]))
    draws = np.asarray(flat(jax.random.split(jax.random.key(0), 400)))
    error = draws.std(0, ddof=1) / 20
    expected = np.asarray(jnp.diagonal(dense(name)[1]["fisher"]))
    moving = error > 1e-12
    assert moving.mean() > 0.9
    assert np.abs((draws.mean(0) - expected) / np.where(moving, error, 1))[moving].max() < 5


def test_weights_that_sum_to_zero_give_zero():
    x = jnp.ones((4, 3))
    model = lambda w, x: x @ w
    actual = fvp.fisher_diagonal(model, fvp.Softmax(), jnp.ones((3, 2)), x, weights=jnp.zeros(4))
    assert not np.any(actual)


def test_bfloat16_parameters_come_back_in_bfloat16():
    x = jnp.ones((4, 3), jnp.bfloat16)
    params = jnp.ones((3, 2), jnp.bfloat16)
    actual = fvp.fisher_diagonal(lambda w, x: x @ w, fvp.Gaussian(), params, x)
    assert actual.dtype == jnp.bfloat16
    assert np.all(np.asarray(actual, np.float32) == 1)
