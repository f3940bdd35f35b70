"""The workloads' models in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from comparison.workloads import Workload

Params = dict[str, Array]
HEADS = 4


def mlp(params: Params, x: Array) -> Array:
    """Dense layers with tanh between."""
    layers = len(params) // 2
    for i in range(layers):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        x = jnp.tanh(x) if i < layers - 1 else x
    return x


def conv2d(x: Array, w: Array, stride: int = 1) -> Array:
    """A 3 x 3 convolution of NHWC images, padded by one."""
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv(params: Params, x: Array) -> Array:
    """Convolutions, from the second one on of stride two; the mean of the last goes to classes."""
    for i in range(len(params) // 2 - 1):
        x = jax.nn.relu(conv2d(x, params[f"w{i}"], 2 if i else 1) + params[f"b{i}"])
    return x.mean((1, 2)) @ params["w"] + params["b"]


def resnet(params: Params, x: Array) -> Array:
    """Residual blocks; scale and shift are batch normalisation's with fixed statistics."""

    def block(name: str, x: Array, stride: int = 1) -> Array:
        return conv2d(x, params[name], stride) * params[f"{name}_scale"] + params[f"{name}_shift"]

    x = jax.nn.relu(block("stem", x))
    for i in range(sum(name.endswith("_skip") for name in params)):
        stride = 2 if i else 1
        inner = block(f"block{i}_out", jax.nn.relu(block(f"block{i}_in", x, stride)))
        x = jax.nn.relu(inner + x[:, ::stride, ::stride] @ params[f"block{i}_skip"])
    return x.mean((1, 2)) @ params["w"] + params["b"]


def transformer(params: Params, tokens: Array) -> Array:
    """A decoder whose layers are scanned over."""

    def normalized(layer: Params, name: str, x: Array) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * layer[f"{name}_scale"] + layer[f"{name}_shift"]

    def attention(layer: Params, x: Array) -> Array:
        batch, time, width = x.shape
        split = (x @ layer["attend"]).reshape(batch, time, 3, HEADS, width // HEADS)
        query, key, value = (split[:, :, i] for i in range(3))
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * (width // HEADS) ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)
        return mixed.reshape(x.shape) @ layer["project"]

    def step(x: Array, layer: Params) -> tuple[Array, None]:
        x = x + attention(layer, normalized(layer, "first", x))
        hidden = normalized(layer, "second", x) @ layer["up"] + layer["up_bias"]
        return x + jax.nn.gelu(hidden) @ layer["down"] + layer["down_bias"], None

    prefix = "layers_"
    layers = {k.removeprefix(prefix): p for k, p in params.items() if k.startswith(prefix)}
    x = params["embedding"][tokens] + params["positions"]
    return jax.lax.scan(step, x, layers)[0] @ params["out"]


MODELS: dict[str, Callable[[Any, Any], Array]] = {
    "mlp": mlp,
    "regression": mlp,
    "conv": conv,
    "resnet": resnet,
    "transformer": transformer,
}


def loss_of(head: str, z: Array, y: Array) -> Array:
    """The mean over rows of cross-entropy, or of half of the squared error."""
    if head == "gaussian":
        return 0.5 * ((z - y) ** 2).sum(-1).mean()
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1).mean()


def mean_loss(work: Workload) -> Callable[[Any, Any, Any], Array]:
    """The loss of (params, x, y)."""
    return lambda params, x, y: loss_of(work.head, MODELS[work.kind](params, x), y)


def data_of(work: Workload) -> tuple[Any, ...]:
    """Parameters, x, y and vector."""
    return jax.tree.map(jnp.asarray, (work.params, work.x, work.y, work.vector))
