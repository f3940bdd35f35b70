"""The same kinds of models in Flax NNX, Flax Linen and Equinox; registered beside the others.

What is not a parameter (statistics, dropout keys) is in the batch. The frameworks are imported when
a model is made.
"""

import jax
import jax.numpy as jnp
from models import GAUSSIAN, KEY, SIGMOID, SOFTMAX, VOCABULARY, causal_attention, model, normal

from fvp.compatibility import pure_state


def nnx_cnn(training, rng):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            f64 = {"param_dtype": jnp.float64, "rngs": rngs}
            self.conv = nnx.Conv(2, 4, (3, 3), **f64)
            self.norm = nnx.BatchNorm(4, **f64)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.out = nnx.Linear(4, 3, **f64)

        def __call__(self, x):
            h = nnx.relu(self.norm(self.conv(x)))
            return self.out(self.dropout(h).mean((1, 2)))

    net = Net(nnx.Rngs(0))
    net.train() if training else net.eval()
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    def model_fn(params, batch):
        return nnx.merge(graphdef, params, batch["rest"])(batch["x"])

    widen = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    batch = {"x": normal(rng, 5, 4, 4, 2), "rest": jax.tree.map(widen, pure_state(rest))}
    return model_fn, pure_state(params), batch


@model(SOFTMAX, framework="flax")
def nnx_cnn_in_training(rng):
    return nnx_cnn(True, rng)


@model(SOFTMAX, framework="flax")
def nnx_cnn_in_evaluation(rng):
    return nnx_cnn(False, rng)


@model(VOCABULARY, framework="flax")
def nnx_transformer(rng):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            f64 = {"param_dtype": jnp.float64, "rngs": rngs}
            self.embedding = nnx.Embed(5, 4, **f64)
            self.norm = nnx.LayerNorm(4, **f64)
            self.attention = nnx.MultiHeadAttention(
                2,
                4,
                decode=False,
                attention_fn=lambda q, k, v, **_: causal_attention(q, k, v),
                **f64,
            )
            self.mlp = nnx.Sequential(nnx.Linear(4, 8, **f64), nnx.gelu, nnx.Linear(8, 4, **f64))

        def __call__(self, tokens):
            x = self.embedding(tokens)
            x = x + self.attention(self.norm(x))
            return self.embedding.attend(x + self.mlp(x))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def model_fn(params, tokens):
        return nnx.merge(graphdef, params, pure_state(rest))(tokens)

    return model_fn, pure_state(params), jnp.asarray(rng.integers(0, 5, (3, 4)))


@model(SOFTMAX, framework="flax")
def linen_cnn_in_training(rng):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
            h = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(h)
            h = nn.Dropout(0.3, deterministic=False)(nn.relu(h))
            return nn.Dense(3, param_dtype=jnp.float64)(h.mean((1, 2)))

    x = normal(rng, 5, 4, 4, 2)
    variables = Net().init({"params": KEY, "dropout": KEY}, x)

    def model_fn(params, batch):
        z, _ = Net().apply(
            {"params": params, "batch_stats": batch["stats"]},
            batch["x"],
            rngs={"dropout": batch["key"]},
            mutable=["batch_stats"],
        )
        return z

    batch = {"x": x, "stats": variables["batch_stats"], "key": KEY}
    return model_fn, variables["params"], batch


@model(GAUSSIAN, framework="flax")
def linen_gru(rng):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RNN(nn.GRUCell(5, param_dtype=jnp.float64))(x)
            return nn.Dense(3, param_dtype=jnp.float64)(h)

    x = normal(rng, 3, 4, 2)
    params = Net().init(KEY, x)["params"]
    return lambda params, x: Net().apply({"params": params}, x), params, x


@model(SIGMOID, framework="equinox")
def equinox_mlp(rng):
    """The module is the parameter tree, with None and static leaves where nothing is trained."""
    import equinox as eqx

    net = eqx.nn.MLP(4, 3, 6, 2, activation=jnp.tanh, dtype=jnp.float64, key=KEY)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return (
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        params,
        normal(rng, 6, 4),
    )
