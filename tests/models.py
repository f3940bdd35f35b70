"""Small real architectures, each a pure function of float64 parameters.

At most 300 parameters each, for dense Jacobians, and with what libraries stumble over: control
flow, inner transformations, custom rules, shared parameters, coupled examples, many batch axes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dense import CASES, Case

SOFTMAX, SIGMOID = CASES["softmax"], CASES["sigmoid"]
GAUSSIAN, SCALAR_GAUSSIAN = CASES["gaussian-vector"], CASES["gaussian-0d"]
VOCABULARY = dataclasses.replace(SOFTMAX, event_shape=(5,), outcomes=np.arange(5))

KEY = jax.random.key(11)
DOTS = jax.checkpoint_policies.dots_saveable


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """One architecture; ``make(rng)`` returns ``(model_fn, params, batch)``."""

    name: str
    case: Case
    make: Callable[[np.random.Generator], tuple[Callable, Any, Any]]
    framework: str | None = None  # the package it needs beside JAX
    has_jvp: bool = True


MODELS: dict[str, Model] = {}


def model(case, **options):
    """Registers a ``make`` under its own name."""

    def register(make):
        MODELS[make.__name__] = Model(make.__name__, case, make, **options)
        return make

    return register


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


def weight(rng, *shape):
    """Scaled by the fan-in: the product of all axes but the last."""
    return normal(rng, *shape) / np.sqrt(np.prod(shape[:-1]))


def layer(rng, inputs, outputs):
    return {"w": weight(rng, inputs, outputs), "b": 0.1 * normal(rng, outputs)}


def affine(p, x):
    return x @ p["w"] + p["b"]


def conv(x, w, stride=1, dilation=1):
    """NHWC convolution with SAME padding; ``dilation`` of the input up-samples."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME" if dilation == 1 else [(1, 2), (1, 2)],
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def standardise(x, axes, scale=1.0, bias=0.0):
    centred = x - x.mean(axes, keepdims=True)
    return (
        scale * centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5) + bias
    )


# --- Feed-forward -----------------------------------------------------------------------------


@model(SOFTMAX)
def mlp(rng):
    params = [layer(rng, 4, 6), layer(rng, 6, 5), layer(rng, 5, 3)]

    def model_fn(params, x):
        for p in params[:-1]:
            x = jnp.tanh(affine(p, x))
        return affine(params[-1], x)

    return model_fn, params, normal(rng, 6, 4)


@model(SOFTMAX)
def mlp_of_inner_jit(rng):
    params = {"hidden": layer(rng, 4, 6), "out": layer(rng, 6, 3)}
    inner = jax.jit(lambda p, x: jax.jit(jnp.tanh)(affine(p, x)))
    outer = jax.jit(lambda params, x: affine(params["out"], inner(params["hidden"], x)))
    return outer, params, normal(rng, 6, 4)


@model(SIGMOID)
def mlp_with_remat(rng):
    params = [layer(rng, 4, 6), layer(rng, 6, 6), layer(rng, 6, 3)]

    def model_fn(params, x):
        x = jax.checkpoint(lambda p, x: jnp.sin(affine(p, x)))(params[0], x)
        x = jax.checkpoint(lambda p, x: jnp.tanh(affine(p, x)), policy=DOTS)(params[1], x)
        return affine(params[2], x)

    return model_fn, params, normal(rng, 6, 4)


@jax.custom_vjp
def clipped(x):
    """Identity in [-1, 1]; passes a tenth of the gradient outside. Has no JVP rule."""
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (jnp.where(jnp.abs(x) > 1, 0.1 * g, g),))


@model(SOFTMAX, has_jvp=False)
def mlp_with_custom_vjp(rng):
    params = {"hidden": layer(rng, 4, 6), "out": layer(rng, 6, 3)}

    def model_fn(params, x):
        return affine(params["out"], clipped(affine(params["hidden"], x)))

    return model_fn, params, normal(rng, 6, 4)


@model(SOFTMAX)
def mlp_with_dropout(rng):
    params = {"hidden": layer(rng, 4, 8), "out": layer(rng, 8, 3)}

    def model_fn(params, batch):
        hidden = jnp.tanh(affine(params["hidden"], batch["x"]))
        kept = jax.random.bernoulli(batch["key"], 0.7, hidden.shape)
        return affine(params["out"], jnp.where(kept, hidden / 0.7, 0))

    return model_fn, params, {"x": normal(rng, 6, 4), "key": KEY}


@model(GAUSSIAN)
def mixture_of_experts(rng):
    """Top-1 routing: tokens are sorted by expert, gathered, and scattered back."""
    params = {
        "gate": weight(rng, 4, 3),
        "w": jnp.stack([weight(rng, 4, 5) for _ in range(3)]),
        "out": jnp.stack([weight(rng, 5, 3) for _ in range(3)]),
    }

    def model_fn(params, x):
        gate = jax.nn.softmax(x @ params["gate"])
        choice = gate.argmax(-1)
        order = jnp.argsort(choice)
        hidden = jnp.tanh(jnp.einsum("nf,nfh->nh", x[order], params["w"][choice[order]]))
        y = jnp.einsum("nh,nhc->nc", hidden, params["out"][choice[order]])
        y = jnp.zeros_like(y).at[order].add(y)
        return y * jnp.take_along_axis(gate, choice[:, None], axis=-1)

    return model_fn, params, normal(rng, 7, 4)


@model(SCALAR_GAUSSIAN)
def pde_residual(rng):
    """Laplacian of a network plus a nonlinear term, at collocation points."""
    params = {"hidden": layer(rng, 2, 8), "out": layer(rng, 8, 1)}

    def residual(params, x):
        u = lambda x: affine(params["out"], jnp.tanh(affine(params["hidden"], x)))[0]
        second = lambda e: jax.jvp(lambda x: jax.jvp(u, (x,), (e,))[1], (x,), (e,))[1]
        return jax.vmap(second)(jnp.eye(2)).sum() + u(x) ** 3

    return jax.vmap(residual, in_axes=(None, 0)), params, normal(rng, 8, 2)


# --- Convolutions -----------------------------------------------------------------------------


def conv_batchnorm_params(rng):
    bn = {"scale": 1 + 0.1 * normal(rng, 4), "bias": 0.1 * normal(rng, 4)}
    return {"conv": weight(rng, 3, 3, 2, 4), "norm": bn, "out": layer(rng, 4, 3)}


@model(SOFTMAX)
def cnn_with_batchnorm_in_evaluation(rng):
    def model_fn(params, batch):
        h = (conv(batch["x"], params["conv"]) - batch["mean"]) * jax.lax.rsqrt(batch["var"] + 1e-5)
        h = jax.nn.relu(params["norm"]["scale"] * h + params["norm"]["bias"])
        return affine(params["out"], h.mean((1, 2)))

    batch = {"x": normal(rng, 5, 4, 4, 2), "mean": normal(rng, 4), "var": normal(rng, 4) ** 2}
    return model_fn, conv_batchnorm_params(rng), batch


@model(SOFTMAX)
def cnn_with_batchnorm_in_training(rng):
    """The statistics of the batch couple its examples."""

    def model_fn(params, x):
        h = jax.nn.relu(standardise(conv(x, params["conv"]), (0, 1, 2), **params["norm"]))
        return affine(params["out"], h.mean((1, 2)))

    return model_fn, conv_batchnorm_params(rng), normal(rng, 5, 4, 4, 2)


@model(SOFTMAX)
def resnet_block(rng):
    params = {
        "first": weight(rng, 3, 3, 2, 4),
        "second": weight(rng, 3, 3, 4, 4),
        "skip": weight(rng, 1, 1, 2, 4),
        "out": layer(rng, 4, 3),
    }

    def model_fn(params, x):
        h = jax.nn.relu(standardise(conv(x, params["first"], stride=2), (1, 2)))
        h = standardise(conv(h, params["second"]), (1, 2)) + conv(x, params["skip"], stride=2)
        return affine(params["out"], jax.nn.relu(h).max((1, 2)))

    return model_fn, params, normal(rng, 5, 4, 4, 2)


@model(SOFTMAX)
def unet(rng):
    """One level down and up again with a skip; (B, H, W, C) logits, a label per pixel."""
    params = {
        "in": weight(rng, 3, 3, 1, 3),
        "down": weight(rng, 3, 3, 3, 4),
        "up": weight(rng, 3, 3, 4, 3),
        "out": layer(rng, 6, 3),
    }

    def model_fn(params, x):
        top = jax.nn.gelu(conv(x, params["in"]))
        bottom = jax.nn.gelu(conv(top, params["down"], stride=2))
        up = conv(bottom, params["up"], dilation=2)
        return affine(params["out"], jnp.concatenate([top, up], axis=-1))

    return model_fn, params, normal(rng, 2, 4, 4, 1)


# --- Sequences --------------------------------------------------------------------------------


@model(SIGMOID)
def rnn(rng):
    params = {"x": weight(rng, 3, 6), "h": weight(rng, 6, 6), "out": layer(rng, 6, 3)}

    def model_fn(params, x):
        cell = lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"]), None)
        h, _ = jax.lax.scan(cell, jnp.zeros((x.shape[0], 6), x.dtype), jnp.swapaxes(x, 0, 1))
        return affine(params["out"], h)

    return model_fn, params, normal(rng, 4, 5, 3)


def block_params(rng, width):
    return {
        "attention_norm": 1 + 0.1 * normal(rng, width),
        "qkv": weight(rng, width, 3 * width),
        "projection": weight(rng, width, width),
        "mlp_norm": 1 + 0.1 * normal(rng, width),
        "up": layer(rng, width, width),
        "down": layer(rng, width, width),
    }


def causal_attention(q, k, v):
    """On (B, T, heads, D), where jax.nn.dot_product_attention rounds its softmax to float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)


def transformer_block(p, x, heads=2):
    """Pre-norm causal attention and MLP on (B, T, D)."""
    h = standardise(x, -1, p["attention_norm"]) @ p["qkv"]
    q, k, v = (h.reshape(*h.shape[:2], heads, -1) for h in jnp.split(h, 3, axis=-1))
    x = x + causal_attention(q, k, v).reshape(x.shape) @ p["projection"]
    return x + affine(p["down"], jax.nn.gelu(affine(p["up"], standardise(x, -1, p["mlp_norm"]))))


@model(VOCABULARY)
def transformer(rng, vocabulary=5, length=4, width=4, depth=2):
    """Decoder-only language model: scan over stacked blocks, output weights tied to the input's."""
    blocks = [block_params(rng, width) for _ in range(depth)]
    params = {
        "embedding": normal(rng, vocabulary, width),
        "position": 0.1 * normal(rng, length, width),
        "blocks": jax.tree.map(lambda *p: jnp.stack(p), *blocks),
        "norm": 1 + 0.1 * normal(rng, width),
    }

    def model_fn(params, tokens):
        x = params["embedding"][tokens] + params["position"]
        x, _ = jax.lax.scan(lambda x, p: (transformer_block(p, x), None), x, params["blocks"])
        return standardise(x, -1, params["norm"]) @ params["embedding"].T

    return model_fn, params, jnp.asarray(rng.integers(0, vocabulary, (3, length)))
