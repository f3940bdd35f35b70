"""What is told of the last step, under wrappers and in words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvp

COMPILE_QUICKLY = True

HEAD, X, Y = fvp.Softmax(), jnp.eye(4, 2), jnp.array([0, 1, 2, 0])
W = jnp.linspace(-1, 1, 6).reshape(2, 3)


def model_fn(w, x):
    return x @ w


def gradient(w):
    return jax.grad(lambda w: HEAD.nll(model_fn(w, X), Y).mean())(w)


def after_one_step(tx, scale=1.0):
    return tx.update(scale * gradient(W), tx.init(W), W, batch=X, targets=Y)[1]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.identity(), tx, optax.scale(-1.0)),
        lambda tx: optax.apply_if_finite(optax.masked(tx, True), 3),
    ],
    ids=["alone", "chain", "masked in apply_if_finite"],
)
def test_numbers_are_those_of_the_state_under_any_wrapper(wrap):
    state = after_one_step(wrap(fvp.scale_by_fisher(model_fn, HEAD, damping=0.5)))
    numbers = fvp.diagnostics(state)
    assert "noise_leads" not in numbers
    assert numbers["step"] == 1
    for name in ("accepted", "damping", "iterations", "residual_norm", "predicted_kl"):
        assert numbers[name] == optax.tree.get(state, name)
        assert numbers[name].shape == ()
    assert jax.tree.map(float, numbers)["damping"] == 0.5
    compiled = jax.jit(fvp.diagnostics)(state)
    jax.tree.map(np.testing.assert_array_equal, compiled, numbers)


def test_the_part_of_noise_is_told_where_its_rule_is_on():
    tx = fvp.natural_gradient(1.0, model_fn, HEAD)
    state = after_one_step(tx)
    assert fvp.diagnostics(state)["noise_leads"] == 0
    claims = state.noise.claims._replace(claimed=jnp.float32(4), refuted=jnp.float32(1))
    state = state._replace(noise=state.noise._replace(claims=claims))
    assert fvp.diagnostics(state)["fitted_noise"] == 0.25
    assert fvp.describe(state).endswith("; 25% of what steps claimed was noise")
    learned = state.noise.learned._replace(length=jnp.float32(0.01))
    leads = state.noise._replace(leads=jnp.array(True), learned=learned)
    expected = "step 1: noise leads; a step to the average of iterates, length 0.01"
    assert fvp.describe(state._replace(noise=leads)) == expected


def test_words_for_steps_of_every_kind():
    tx = fvp.scale_by_fisher(model_fn, HEAD, damping=0.5)
    assert fvp.describe(tx.init(W)) == "step 0: nothing was done yet"
    assert fvp.describe(after_one_step(tx)).startswith("step 1: accepted; damping 0.5, ")
    assert "step 1: rejected, the update is zero" in fvp.describe(after_one_step(tx, jnp.nan))
    wrong = after_one_step(tx)._replace(gradient_mismatch=jnp.array(True))
    assert "pass its loss as value_fn=" in fvp.describe(wrong)


UNKNOWN = "; the loss is unknown, so that noise is not looked for: pass targets= or value_fn="


@pytest.mark.parametrize(
    "make",
    [
        lambda: fvp.natural_gradient(1.0, model_fn, HEAD),
        lambda: optax.chain(fvp.scale_by_kfac(model_fn, HEAD), optax.scale(-0.1)),
    ],
    ids=["natural_gradient", "scale_by_kfac"],
)
def test_words_for_a_loss_that_nobody_gave(make):
    tx = make()
    step = lambda state, **loss: tx.update(gradient(W), state, W, batch=X, **loss)[1]
    state = step(step(tx.init(W)))
    assert fvp.describe(state).endswith(UNKNOWN)
    nll = lambda w, x: HEAD.nll(model_fn(w, x), Y).mean()
    for loss in ({"targets": Y}, {"value_fn": nll}):
        known = step(state, **loss)
        assert not fvp.describe(known).endswith(UNKNOWN)
        assert not fvp.describe(step(known)).endswith(UNKNOWN)
    # One that was given, but is not finite, is not unknown; nor is one that noise has no part in.
    lost = step(tx.init(W), value_fn=lambda w, x: jnp.nan * nll(w, x))
    assert "rejected" in fvp.describe(lost)
    assert not fvp.describe(lost).endswith(UNKNOWN)
    fixed = fvp.scale_by_fisher(model_fn, HEAD, damping=fvp.LevenbergMarquardt())
    _, state = fixed.update(gradient(W), fixed.init(W), W, batch=X)
    assert not fvp.describe(state).endswith(UNKNOWN)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("damping", [0.5, None])
def test_the_state_of_an_nnx_optimizer(damping, behind):
    nnx = pytest.importorskip("flax.nnx")
    import fvp.nnx

    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = fvp.natural_gradient(1.0, fvp.nnx.model_fn, HEAD, damping=damping)
    if behind:
        tx = optax.chain(tx, optax.clip_by_global_norm(1.0))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    x = X.astype(jnp.float32)

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda net: HEAD.nll(net(x), Y).mean())(net)
        optimizer.update(net, grads, batch=fvp.nnx.snapshot(net, x), targets=Y)
        return fvp.diagnostics(optimizer)

    compiled = step(net, optimizer)
    for state in (optimizer, optimizer.opt_state):
        numbers = fvp.diagnostics(state)
        assert numbers.keys() == compiled.keys()
        jax.tree.map(np.testing.assert_array_equal, numbers, compiled)
        assert fvp.describe(state).startswith("step 1: accepted; damping ")
    assert ("noise_leads" in numbers) == (damping is None)


def test_the_state_of_another_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    other = nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)
    for state in (other, other.opt_state, nnx.state(other)):
        with pytest.raises(ValueError, match="found none"):
            fvp.diagnostics(state)


def test_states_that_are_not_one_are_named():
    with pytest.raises(ValueError, match="found none"):
        fvp.diagnostics(optax.adam(0.1).init(W))
    tx = fvp.scale_by_fisher(model_fn, HEAD, damping=0.5)
    with pytest.raises(ValueError, match="found several"):
        fvp.diagnostics((tx.init(W), tx.init(W)))
    stacked = jax.vmap(tx.init)(jnp.stack([W, W]))
    assert fvp.diagnostics(stacked)["step"].shape == (2,)
    with pytest.raises(ValueError, match="got stacked ones"):
        fvp.describe(stacked)
    with pytest.raises(ValueError, match="under jit take diagnostics"):
        jax.jit(lambda state: fvp.describe(state) and W)(tx.init(W))
