"""The Flax helpers: curvature and gradient see one function, inside Flax's own tools."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import rarely, relative_error

import fvp
from fvp.compatibility import pure_state

nnx = pytest.importorskip("flax.nnx", reason="tests of the Flax helpers")
linen = pytest.importorskip("flax.linen", reason="tests of the Flax helpers")

import fvp.linen  # noqa: E402
import fvp.nnx  # noqa: E402

COMPILE_QUICKLY = True

HEAD, STEPS = fvp.Softmax(), 5
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(STEPS, 12, 6, 6, 1)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, (STEPS, 12)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(h).mean((1, 2)))


def transform():
    return fvp.natural_gradient(0.5, fvp.nnx.model_fn, HEAD, damping=0.1, maxiter=5)


def injected():
    make = optax.inject_hyperparams(
        fvp.natural_gradient, static_args=("model_fn", "head", "maxiter")
    )
    return make(optax.constant_schedule(0.5), model_fn=fvp.nnx.model_fn, head=HEAD, maxiter=5)


def nested():
    chain = optax.chain(optax.clip_by_global_norm(10.0), transform())
    return optax.MultiSteps(optax.apply_if_finite(chain, 3), 2)


WRAPPED = {
    "plain": transform,
    "chain in apply_if_finite in MultiSteps": nested,
    "inject_hyperparams": injected,
}


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param("plain", marks=pytest.mark.compile_in_full),
        list(WRAPPED)[1],
        rarely(list(WRAPPED)[2]),
    ],
)
def test_curvature_and_gradient_logits_are_equal_to_the_last_bit(wrapper):
    net, traces = Net(nnx.Rngs(0)), []
    optimizer = nnx.Optimizer(net, WRAPPED[wrapper](), wrt=nnx.Param)
    start = fvp.nnx.parameters(net)

    @nnx.jit
    def step(net, optimizer, x, y):
        traces.append(None)
        batch = fvp.nnx.snapshot(net, x)
        params = fvp.nnx.parameters(net)
        z_curvature = fvp.fisher(fvp.nnx.model_fn, HEAD, params, batch).output

        def loss(net):
            z = net(x)
            return HEAD.nll(z, y).mean(), z

        (_, z), grads = nnx.value_and_grad(loss, has_aux=True)(net)
        optimizer.update(net, grads, batch=batch)
        return z, z_curvature, HEAD.nll(fvp.nnx.model_fn(params, batch), y).mean()

    for x, y in zip(X, Y, strict=True):
        z, z_curvature, loss = step(net, optimizer, x, y)
        np.testing.assert_array_equal(z, z_curvature)
        assert jnp.isfinite(loss)
    assert len(traces) == 1
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (start, fvp.nnx.parameters(net))), strict=True)
    )


def test_the_live_state_would_give_another_function():
    """Why a snapshot is needed: a second call of the module draws another dropout mask."""
    net = Net(nnx.Rngs(0))
    batch = fvp.nnx.snapshot(net, X[0])
    first = net(X[0])
    np.testing.assert_array_equal(fvp.nnx.model_fn(fvp.nnx.parameters(net), batch), first)
    assert relative_error(net(X[0]), first) > 1e-2


def test_the_curvature_pass_leaves_the_module_as_it_was():
    net = Net(nnx.Rngs(0))
    before = pure_state(nnx.state(net, nnx.Not(nnx.RngKey)))
    batch = fvp.nnx.snapshot(net, X[0])
    params = fvp.nnx.parameters(net)
    assert jnp.isfinite(fvp.fisher(fvp.nnx.model_fn, HEAD, params, batch).quadratic_form(params))
    after = pure_state(nnx.state(net, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("batch", [X[0], {"x": X[0]}, (X[0], Y[0])], ids=["array", "dict", "tuple"])
def test_a_batch_that_is_no_snapshot_is_an_error(batch):
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, transform(), wrt=nnx.Param)
    grads = nnx.grad(lambda net: HEAD.nll(net(X[0]), Y[0]).mean())(net)
    with pytest.raises(TypeError, match=r"batch: expected fvp.nnx.snapshot\(net, x\), got "):
        optimizer.update(net, grads, batch=batch, targets=Y[0])


def test_chunks_split_the_inputs_and_share_the_rest():
    net = Net(nnx.Rngs(0))
    net.eval()
    batch, params = fvp.nnx.snapshot(net, X[0]), fvp.nnx.parameters(net)

    @jax.jit
    def both(params, batch):
        arguments = fvp.nnx.model_fn, HEAD, params, batch
        chunked = fvp.fisher(*arguments, chunk_size=5, batch_axes=fvp.nnx.BATCH_AXES)
        return chunked @ params, fvp.fisher(*arguments) @ params

    for a, b in zip(*map(jax.tree.leaves, both(params, batch)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_linen_train_state_takes_the_step_of_the_transform():
    class Classifier(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.relu(linen.Dense(8)(x.reshape(len(x), -1)))
            return linen.Dense(3)(linen.Dropout(0.4, deterministic=not train)(x))

    module = Classifier()
    init = jax.jit(functools.partial(module.init, train=False))
    params = init(jax.random.key(0), X[0])["params"]

    def model_fn(params, batch):
        rngs = {"dropout": batch["key"]}
        return module.apply({"params": params}, batch["x"], train=True, rngs=rngs)

    tx = fvp.natural_gradient(0.5, model_fn, HEAD, damping=0.1, maxiter=5)
    state = fvp.linen.TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    batch = {"x": X[0], "key": jax.random.key(1)}
    gradient = jax.grad(lambda p: HEAD.nll(model_fn(p, batch), Y[0]).mean())

    @jax.jit
    def both(state):
        stepped = state.apply_gradients(grads=gradient(state.params), batch=batch)
        updates, _ = tx.update(gradient(state.params), state.opt_state, state.params, batch=batch)
        return stepped, optax.apply_updates(state.params, updates)

    stepped, expected = both(state)
    for a, b in zip(*map(jax.tree.leaves, (stepped.params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert stepped.step == 1
    assert stepped.tx is tx


@pytest.mark.parametrize("kind", ["fisher", rarely("kfac"), "averaged kfac"])
def test_flax_serialization_restores_the_state(kind):
    from flax import serialization

    model_fn = lambda params, x: jnp.tanh(x @ params["w"]) + params["b"]
    params, x = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, jnp.eye(8, 4)
    tx = {
        "fisher": lambda: fvp.scale_by_fisher(model_fn, HEAD),
        "kfac": lambda: fvp.scale_by_kfac(model_fn, HEAD),
        "averaged kfac": lambda: fvp.scale_by_kfac(model_fn, HEAD, example_batch=x),
    }[kind]()
    data = {"batch": x, "targets": jnp.arange(8) % 3}
    _, state = jax.jit(tx.update)(params, tx.init(params), params, **data)
    for restored in (
        serialization.from_bytes(tx.init(params), serialization.to_bytes(state)),
        serialization.from_state_dict(tx.init(params), serialization.to_state_dict(state)),
    ):
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    if kind == "averaged kfac":
        other = fvp.scale_by_kfac(lambda p, x: x @ p, HEAD, example_batch=x).init(params["w"])
        with pytest.raises(ValueError, match=r"KFAC.*arrays"):
            serialization.from_state_dict(other, serialization.to_state_dict(state))


# Batch statistics --------------------------------------------------------------------------------


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.97, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.dropout(jnp.tanh(self.norm(scale * self.inner(x))))


BATCHES = [
    jnp.asarray(np.random.default_rng(k).normal(k, 1 + k, size=(6, 3)), jnp.float32)
    for k in range(3)
]


def moments_of(activations):
    return np.mean([a.mean(0) for a in activations], 0), np.mean([a.var(0) for a in activations], 0)


def test_batch_statistics_are_the_means_of_those_of_the_batches():
    model = Normalised(nnx.Rngs(0))
    mean, var = moments_of([2 * np.asarray(model.inner(x)) for x in BATCHES])
    generators = jax.tree.map(np.asarray, nnx.state(model, nnx.RngCount))
    model.eval()
    fvp.nnx.estimate_batch_statistics(model, ((x, 2.0) for x in BATCHES))
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-4)
    np.testing.assert_allclose(model.norm.var[...], var, rtol=1e-4)
    assert model.norm.use_running_average  # still in evaluation
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.RngCount), generators)


def test_with_the_statistics_of_one_batch_evaluation_is_training():
    model = Normalised(nnx.Rngs(0))
    model.norm.use_running_average = False
    trained = model(BATCHES[1])
    fvp.nnx.estimate_batch_statistics(model, BATCHES[1:2])
    model.eval()
    np.testing.assert_allclose(model(BATCHES[1]), trained, rtol=1e-4, atol=1e-5)


def test_batch_statistics_of_linen_models():
    layers = linen.Dense(4), linen.BatchNorm(use_running_average=False, momentum=0.9)
    module = linen.Sequential(layers)
    variables = module.init(jax.random.key(0), BATCHES[0])

    def update(statistics, x):
        new = {**variables, "batch_stats": statistics}
        return module.apply(new, x, mutable="batch_stats")[1]["batch_stats"]

    found = fvp.linen.estimate_batch_statistics(update, variables["batch_stats"], BATCHES)
    dense = variables["params"]["layers_0"]
    activations = [np.asarray(x @ dense["kernel"] + dense["bias"]) for x in BATCHES]
    for name, expected in zip(("mean", "var"), moments_of(activations), strict=True):
        np.testing.assert_allclose(found["layers_1"][name], expected, rtol=1e-4)


def test_bad_batches_of_statistics():
    with pytest.raises(ValueError, match="at least one"):
        fvp.nnx.estimate_batch_statistics(Normalised(nnx.Rngs(0)), [])
    with pytest.raises(ValueError, match="training mode"):
        fvp.linen.estimate_batch_statistics(lambda s, x: s, {"mean": jnp.ones(2)}, BATCHES)
