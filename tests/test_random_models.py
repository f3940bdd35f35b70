"""Models that nobody thought of: what the library says of them is exact, or a refusal that is true.

`benchmarks/random_models.py` runs more and larger ones, and each construct alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, rarely, relative_error
from random_models import (
    LARGEST,
    model_of,
    random_model,
    reference,
    sigmoid_fisher,
    size,
    softmax_fisher,
    verdicts,
)

COMPILE_QUICKLY = True

SEEDS = (0, 1, 5, 6, 7, 12, 15, 20, 23, 25)  # many of them once failed

model_of_seed = functools.cache(lambda seed: random_model(seed, blocks=1))


@pytest.mark.parametrize("seed", [1, 12, 20, *map(rarely, (0, 5, 6, 7, 15, 23, 25))])
def test_exact_or_refused_with_the_primitive(seed):
    model = model_of_seed(seed)
    wrong = [verdict for verdict in verdicts(model) if not verdict.fine]
    assert not wrong, f"{model.text}\n" + "\n".join(map(str, wrong))


def test_models_are_small_and_their_seeds_repeat_them():
    assert all(0 < size(model_of_seed(seed).params) <= LARGEST for seed in SEEDS)
    model, again = model_of_seed(0), random_model(0, blocks=1)
    assert again.text == model.text
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("wrapper", "scanned_with_shared_weights"),
        ("sequence block", "causal_attention"),
        ("weighting", "fractional_weights_with_zeros"),
    ],
)
def test_the_reference_agrees_with_central_differences(kind, name):
    model, step = model_of(kind, name), 1e-5
    flat, unravel = model.flat
    outputs = jax.jit(jax.vmap(lambda flat: model.model_fn(unravel(flat), model.batch)))
    steps = step * np.eye(flat.size)
    jacobian = (outputs(flat + steps) - outputs(flat - steps)) / (2 * step)
    z = model.model_fn(model.params, model.batch)
    jacobian = np.moveaxis(jacobian, 0, -1).reshape(-1, z.shape[-1], flat.size)
    weights = np.ones(z.shape[:-1]) if model.weights is None else model.weights
    weights = np.asarray(weights / np.sum(weights)).ravel()
    # The plain head is a Gaussian of scale one.
    expected = np.einsum("n,nip,niq->pq", weights, jacobian, jacobian)
    assert relative_error(reference(model), expected) < 1e-8


@pytest.mark.parametrize(
    ("name", "formula"), [("softmax", softmax_fisher), ("sigmoid", sigmoid_fisher)]
)
def test_the_formulas_of_the_heads_are_second_moments_of_scores(name, formula):
    z = np.random.default_rng(0).normal(size=(4, 3))
    assert relative_error(formula(z), jax.vmap(CASES[name].fisher)(jnp.asarray(z))) < 1e-12
