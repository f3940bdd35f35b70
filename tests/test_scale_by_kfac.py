"""K-FAC as an optax transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import rarely, relative_error
from models import affine, layer, normal
from sklearn.datasets import load_digits

import fvp

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(labels)


def tanh_mlp(params, x):
    for p in params[:-1]:
        x = jnp.tanh(affine(p, x))
    return affine(params[-1], x)


def small():
    rng = np.random.default_rng(0)
    params = [layer(rng, 4, 5), layer(rng, 5, 3)]
    return params, normal(rng, 8, 4), jnp.asarray(rng.integers(0, 3, 8))


def loss(params, x, y):
    return HEAD.nll(tanh_mlp(params, x), y).mean()


def train(tx, params, x, y, steps):
    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params, x, y)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        params = jax.tree.map(jnp.subtract, params, updates)
        return params, state, loss(params, x, y)

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, state


@pytest.mark.parametrize("average", [rarely(False), True])
def test_defaults_train_digits_as_the_best_peer_tuned(average):
    """kfac-jax at its best damping: 1.1e-2 after 10 steps and 4.5e-4 after 20."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.float32, [layer(rng, 64, 128), layer(rng, 128, 10)])
    x, y = digits()
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, example_batch=x if average else None)
    losses, _ = train(tx, params, x, y, 20)
    assert losses[9] <= 1.1e-2
    assert losses[19] <= 4.5e-4
    assert np.all(np.diff(losses) <= 0)


def test_one_step_solves_least_squares():
    rng = np.random.default_rng(0)
    params, x, y = layer(rng, 4, 2), normal(rng, 9, 4), normal(rng, 9, 2)
    head = fvp.Gaussian()
    tx = fvp.scale_by_kfac(affine, head, damping=0.0, num_samples=None)
    gradient = jax.grad(lambda p: head.nll(affine(p, x), y).mean())(params)
    update, _ = tx.update(gradient, tx.init(params), params, batch=x)
    solved = jax.tree.map(jnp.subtract, params, update)
    left = jax.grad(lambda p: head.nll(affine(p, x), y).mean())(solved)
    assert optax.tree.norm(left) < 1e-5 * optax.tree.norm(gradient)


def test_averages_carry_their_weight():
    params, x, y = small()
    gradient = jax.grad(loss)(params, x, y)
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, damping=0.1, example_batch=x, num_samples=None)
    state = tx.init(params)
    step = jax.jit(lambda state, batch: tx.update(gradient, state, params, batch=batch)[1])
    state = step(step(state, x), 2 * x)

    @jax.jit
    def means(state):
        once, twice = (fvp.kfac(tanh_mlp, HEAD, params, b) for b in (x, 2 * x))
        mean = jax.tree.map(lambda a, b: (0.95 * a + b) / 1.95, once, twice)
        return jax.tree.map(lambda a: a / state.solver.weight, state.solver.factors), mean

    assert relative_error(*means(state)) < 1e-6


@functools.cache
def eight_steps():
    """Of a transform that keeps factors and inverses, as a function of the gradients' signs."""
    params, x, y = small()
    options = {"factor_period": 2, "inverse_period": 3, "example_batch": x}
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, **options)

    @jax.jit
    def run(signs):
        def step(carry, sign):
            params, state = carry
            gradient = jax.tree.map(lambda g: sign * g, jax.grad(loss)(params, x, y))
            updates, state = tx.update(gradient, state, params, batch=x, targets=y)
            params = jax.tree.map(jnp.subtract, params, updates)
            return (params, state), (loss(params, x, y), state)

        return jax.lax.scan(step, (params, tx.init(params)), signs)[1]

    return run


def test_state_is_fixed_under_scan_and_inverses_wait_their_turn():
    losses, states = eight_steps()(jnp.ones(8))
    weights, damping = states.solver.weight, states.solver.inverse.damping
    assert losses[-1] < 0.3 * loss(*small())
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert damping[0] == damping[1] == damping[2] != damping[3] == damping[5]


def test_a_rejected_step_inverts_anew():
    _, states = eight_steps()(jnp.ones(8).at[1].set(-1.0))
    assert states.accepted[:3].tolist() == [True, False, True]
    inverted_with = states.solver.inverse.damping
    assert inverted_with[1] == inverted_with[0]
    assert inverted_with[2] == states.damping[2] > inverted_with[0]


@functools.cache
def default_step():
    """The first state, and one program for a step of the defaults with weights."""
    params, _, y = small()
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD)
    step = lambda g, state, x, w: tx.update(g, state, params, batch=x, targets=y, weights=w)
    return tx.init(params), jax.jit(step)


def test_a_step_that_does_not_lower_the_loss_is_rejected():
    params, x, y = small()
    gradient = jax.tree.map(jnp.negative, jax.grad(loss)(params, x, y))
    state, step = default_step()
    update, state = step(gradient, state, x, jnp.ones(8))
    assert not state.accepted
    assert optax.tree.norm(update) == 0
    assert state.control > state.damping == np.float32(0.1)
    broken = jax.tree.map(lambda g: g * jnp.nan, gradient)
    update, state = step(broken, state, x, jnp.ones(8))
    assert not state.accepted
    assert optax.tree.norm(update) == 0


def test_rounding_is_not_taken_for_failure():
    """Where the loss can't fall any more, steps stay accepted and damping does not run away."""
    rng = np.random.default_rng(0)
    head, params = fvp.Gaussian(), jax.tree.map(jnp.float32, layer(rng, 4, 2))
    x, y = (jnp.float32(normal(rng, 9, k)) for k in (4, 2))
    tx = fvp.scale_by_kfac(affine, head, num_samples=None)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: head.nll(affine(p, x), y).mean())(params)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        return (jax.tree.map(jnp.subtract, params, updates), state), state.damping

    run = jax.jit(lambda state: jax.lax.scan(step, (params, state), length=60)[1])
    damping = run(tx.init(params))
    assert damping[-1] <= damping[0]


def test_a_batch_that_says_nothing_leaves_damping_alone():
    params, x, _ = small()
    start, step = default_step()
    for gradient, batch, weights in (
        (jnp.zeros_like, x, jnp.zeros(8)),
        (lambda p: jnp.full_like(p, jnp.nan), x.at[0].set(jnp.nan), jnp.ones(8)),
    ):
        updates, state = step(jax.tree.map(gradient, params), start, batch, weights)
        assert not state.accepted
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        assert state.control == start.control


def test_a_bad_batch_stays_out_of_the_averages():
    params, x, y = small()
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, example_batch=x)

    def step(carry, x):
        params, state = carry
        gradient = jax.grad(loss)(params, x, y)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        params = jax.tree.map(jnp.subtract, params, updates)
        return (params, state), (loss(params, batch, y), state.accepted)

    batch = x
    batches = jnp.stack([x * jnp.nan, x, x.at[0, 0].set(jnp.inf), x, x])
    (_, state), (losses, accepted) = jax.lax.scan(step, (params, tx.init(params)), batches)
    assert accepted.tolist() == [False, True, False, True, True]
    assert losses[0] == loss(params, batch, y)
    assert losses[1] == losses[2] > losses[3] > losses[4]
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]
    assert all(finite)


def test_the_predicted_divergence_is_bounded():
    params, x, y = small()
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, damping=1e-3, max_kl=1e-4)

    @jax.jit
    def step(params):
        gradient = jax.grad(loss)(params, x, y)
        update, state = tx.update(gradient, tx.init(params), params, batch=x)
        return fvp.fisher(tanh_mlp, HEAD, params, x).quadratic_form(update), state.predicted_kl

    form, predicted_kl = step(params)
    assert relative_error(0.5 * form, jnp.asarray(1e-4)) < 1e-4
    assert relative_error(predicted_kl, jnp.asarray(1e-4)) < 1e-4


def test_missing_arguments_are_named():
    params, _, _ = small()
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD)
    with pytest.raises(ValueError, match="batch"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="example_batch"):
        fvp.scale_by_kfac(tanh_mlp, HEAD, inverse_period=10)


def test_updates_come_in_the_dtype_of_the_gradients():
    params, x, _ = small()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = fvp.scale_by_kfac(tanh_mlp, HEAD, damping=0.1)
    arguments = (params, jax.eval_shape(tx.init, half), half)
    update, _ = jax.eval_shape(lambda *args: tx.update(*args, batch=x), *arguments)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(update) == dtypes(params)


def test_an_example_batch_beside_masked_parameters_is_an_error():
    params, x, _ = small()
    mask = jax.tree.map(lambda _: True, params)
    mask[0]["b"] = False
    tx = optax.masked(fvp.scale_by_kfac(tanh_mlp, HEAD, example_batch=x), mask)
    with pytest.raises(ValueError, match="example_batch: init sees"):
        tx.init(params)
