"""The defaults train handwritten digits from full batch to small batches, ten seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import fvp

SEEDS = 10
HEAD = fvp.Softmax()


@functools.cache
def data():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


def init(key):
    first, second = jax.random.split(key)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
    return {
        "hidden": (normal(first, 64, 128), jnp.zeros(128, jnp.float32)),
        "out": (normal(second, 128, 10), jnp.zeros(10, jnp.float32)),
    }


def model_fn(params, x):
    (w, b), (v, c) = params["hidden"], params["out"]
    return jnp.tanh(x @ w + b) @ v + c


def batches(seed, size, steps):
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < steps:
        order = rng.permutation(1797)
        rows += [order[i : i + size] for i in range(0, 1797 - size + 1, size)]
    return np.stack(rows[:steps])


def train(size, steps):
    """Losses on all data, (SEEDS, 1 + steps), and products spent, (SEEDS, steps)."""
    images, labels = data()
    tx = fvp.scale_by_fisher(model_fn, HEAD)
    loss = lambda params: HEAD.nll(model_fn(params, images), labels).mean()

    def step(carry, rows):
        params, state = carry
        x, y = (images, labels) if size is None else (images[rows], labels[rows])
        F = fvp.fisher(model_fn, HEAD, params, x)
        _, grads = F.value_and_grad(y)
        updates, state = tx.update(grads, state, params, operator=F, batch=x, targets=y)
        params = jax.tree.map(jnp.subtract, params, updates)
        return (params, state), (loss(params), state.iterations + 1)  # one more for the start

    def run(key, rows):
        params = init(key)
        _, (losses, products) = jax.lax.scan(step, (params, tx.init(params)), rows)
        return jnp.concatenate([loss(params)[None], losses]), products

    rows = (
        np.zeros((SEEDS, steps))
        if size is None
        else [batches(s, size, steps) for s in range(SEEDS)]
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    one_by_one = jax.jit(lambda *seeds: jax.lax.map(lambda seed: run(*seed), seeds))
    losses, products = one_by_one(keys, jnp.asarray(np.stack(rows), jnp.int32))
    return np.asarray(losses), np.asarray(products)


def test_full_batch_converges_to_a_millionth_in_twenty_steps():
    losses, products = train(None, 20)
    assert losses[:, 10].max() <= 1e-3
    assert losses[:, 20].max() <= 1e-6
    assert products.mean() <= 12


def test_batches_of_256_reach_2_6e_3_in_fifty_steps():
    losses, _ = train(256, 50)
    assert np.median(losses[:, -1]) <= 2.6e-3


@pytest.mark.parametrize("size", [64])
def test_small_batches_never_rise_above_their_start(size):
    losses, _ = train(size, 200)
    assert np.all(losses.max(axis=1) <= losses[:, 0])
    assert np.median(losses[:, -1]) <= 1.5e-3
