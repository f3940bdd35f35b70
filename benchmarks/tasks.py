"""Nine training tasks in plain JAX, with their data, for every optimizer that no_tuning.py races.

Nothing but jax, numpy and scikit-learn is imported, so the environments of other libraries can load
this file. Parameters and data are NumPy arrays, the same under every version of jax.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import string
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its training set.

    ``head`` names the loss of one row of ``model_fn(params, inputs)`` along its last axis:
    "softmax" with integer targets, "sigmoid" with targets in [0, 1], or "gaussian", half the
    squared error. The loss is the mean over all rows, weighted if there are ``weights``.
    """

    name: str
    head: str
    init: Callable[[int], Any]  # seed -> params
    model_fn: Callable[[Any, Any], jax.Array]
    inputs: Any
    targets: np.ndarray
    steps: int  # Adam's
    batch_size: int | None = None  # None is the full batch
    weights: np.ndarray | None = None
    evaluation_rows: int | None = None  # the first ones; None is the whole training set
    x64: bool = False

    def loss(self, params: Any, inputs: Any, targets: Any, weights: Any = None) -> jax.Array:
        """The training loss without constants."""
        return self.loss_of(self.model_fn(params, inputs), targets, weights)

    def loss_of(self, z: jax.Array, targets: Any, weights: Any = None) -> jax.Array:
        """The same of the model's output."""
        if self.head == "softmax":
            picked = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
            nll = jax.nn.logsumexp(z, axis=-1) - picked
        elif self.head == "sigmoid":
            nll = (jnp.logaddexp(0, z) - targets * z).sum(-1)
        else:
            nll = ((z - targets) ** 2).sum(-1) / 2
        return nll.mean() if weights is None else (weights * nll).sum() / weights.sum()

    @property
    def data(self) -> tuple[Any, Any, Any]:
        """Inputs, targets and weights (or None) of the whole training set."""
        return self.inputs, self.targets, self.weights

    def rows(self, rows: Any) -> tuple[Any, Any, Any]:
        """The same of some examples."""
        return jax.tree.map(lambda x: x[rows], self.data)

    def batches(self, seed: int) -> Iterator[tuple[Any, Any, Any]]:
        """Shuffled batches for ever, the last incomplete one of a pass left out."""
        if self.batch_size is None:
            yield from itertools.repeat(jax.device_put(self.data))
        rng, size = np.random.default_rng(seed), self.batch_size or 1
        while True:
            order = rng.permutation(len(self.targets))
            for start in range(0, len(order) - size + 1, size):
                yield self.rows(order[start : start + size])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights of standard deviation 1/sqrt(fan-in); the last axis is the layer's output."""
    return (rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]))).astype(np.float32)


def zeros(size: int) -> np.ndarray:
    """Biases."""
    return np.zeros(size, np.float32)


def init_mlp(sizes: tuple[int, ...], seed: int) -> Any:
    """Parameters of a chain of dense layers."""
    rng = np.random.default_rng(seed)
    return [{"w": normal(rng, a, b), "b": zeros(b)} for a, b in itertools.pairwise(sizes)]


def mlp(params: Any, x: jax.Array, linear: tuple[int, ...] = ()) -> jax.Array:
    """Tanh after every layer but the last and those named ``linear``."""
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if i + 1 < len(params) and i not in linear:
            x = jnp.tanh(x)
    return x


def standardised(x: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1."""
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def digits(name: str, batch_size: int | None, steps: int) -> Task:
    """Handwritten digits, 64-128-10."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    return Task(
        name,
        "softmax",
        functools.partial(init_mlp, (64, 128, 10)),
        mlp,
        np.asarray(pixels / 8 - 1, np.float32),
        np.asarray(labels, np.int32),
        steps,
        batch_size,
    )


def digits_cnn() -> Task:
    """Handwritten digits, two convolutions and a dense layer."""

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return [
            {"w": normal(rng, 3, 3, 1, 8), "b": zeros(8)},
            {"w": normal(rng, 3, 3, 8, 16), "b": zeros(16)},
            {"w": normal(rng, 4 * 4 * 16, 10), "b": zeros(10)},
        ]

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for layer, stride in zip(params[:2], (1, 2), strict=True):
            x = jax.lax.conv_general_dilated(
                x, layer["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.tanh(x + layer["b"])
        return x.reshape(len(x), -1) @ params[2]["w"] + params[2]["b"]

    return dataclasses.replace(digits("digits-cnn", 256, 1000), init=init, model_fn=model_fn)


def wide() -> Task:
    """784-512-512-10 on noise, to measure what a step costs."""
    rng = np.random.default_rng(0)
    return Task(
        "wide",
        "softmax",
        functools.partial(init_mlp, (784, 512, 512, 10)),
        mlp,
        rng.normal(size=(1024, 784)).astype(np.float32),
        rng.integers(0, 10, 1024).astype(np.int32),
        steps=60,
        batch_size=256,
    )


def breast_cancer() -> Task:
    """Logistic regression on separable data: the infimum of the loss is 0."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return Task(
        "breast-cancer",
        "sigmoid",
        functools.partial(init_mlp, (30, 1)),
        mlp,
        standardised(np.asarray(x)),
        np.asarray(y, np.float32)[:, None],
        steps=3000,
    )


def diabetes() -> Task:
    """Regression, 10-32-1."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return Task(
        "diabetes",
        "gaussian",
        functools.partial(init_mlp, (10, 32, 1)),
        mlp,
        standardised(np.asarray(x)),
        standardised(np.asarray(y)[:, None]),
        steps=3000,
    )


def draw_curves(count: int, size: int = 28) -> np.ndarray:
    """Images of one random cubic Bezier stroke each, anti-aliased, in [0, 1], a row per image."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 128)[:, None]
    bernstein = np.concatenate(
        [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1
    )
    pixels = np.arange(size) + 0.5
    images = np.empty((count, size * size), np.float32)
    for image in images:
        x, y = (bernstein @ rng.uniform(3, size - 3, (4, 2))).T
        squared = (pixels[:, None, None] - y) ** 2 + (pixels[:, None] - x) ** 2
        image[:] = np.clip(1.5 - np.sqrt(squared.min(-1)), 0, 1).ravel()
    return images


def curves() -> Task:
    """Deep autoencoder of images of curves, with a linear code of 6 numbers."""
    images, sizes = draw_curves(2000), (784, 400, 200, 100, 50, 25, 6)
    return Task(
        "curves",
        "sigmoid",
        functools.partial(init_mlp, sizes + sizes[-2::-1]),
        functools.partial(mlp, linear=(len(sizes) - 2,)),
        images,
        images,
        steps=500,
        batch_size=500,
    )


def transformer(layers: int = 2, width: int = 64, heads: int = 4, context: int = 64) -> Task:
    """Pre-norm transformer of the characters of Python's help texts."""
    text = "".join(c for _, topic in sorted(topics.items()) for c in topic if c in string.printable)
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    tokens = tokens[: len(tokens) // (context + 1) * (context + 1)].astype(np.int32)
    tokens = np.random.default_rng(0).permutation(tokens.reshape(-1, context + 1))

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        dense = lambda a, b: {"w": normal(rng, a, b), "b": zeros(b)}
        norm = lambda: {"scale": np.ones(width, np.float32), "offset": zeros(width)}
        return {
            "embedding": rng.normal(size=(len(alphabet), width)).astype(np.float32),
            "position": 0.1 * rng.normal(size=(context, width)).astype(np.float32),
            "layers": [
                {
                    "norm1": norm(),
                    "qkv": dense(width, 3 * width),
                    "out": dense(width, width),
                    "norm2": norm(),
                    "up": dense(width, 4 * width),
                    "down": dense(4 * width, width),
                }
                for _ in range(layers)
            ],
            "norm": norm(),
            "logits": dense(width, len(alphabet)),
        }

    def dense(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"]

    def norm(p: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p["offset"]

    def attention(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(dense(p["qkv"], x), 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        attended = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        return dense(p["out"], jnp.einsum("bhts,bshd->bthd", attended, v).reshape(x.shape))

    def model_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens] + params["position"]
        for p in params["layers"]:
            x = x + attention(p, norm(p["norm1"], x))
            x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))))
        return dense(params["logits"], norm(params["norm"], x))

    return Task(
        "transformer",
        "softmax",
        init,
        model_fn,
        tokens[:, :-1],
        tokens[:, 1:],
        steps=400,
        batch_size=32,
        evaluation_rows=256,
    )


def poisson(interior: int = 900, edge: int = 120) -> Task:
    """Residuals of -u_xx - u_yy = f on the unit square and of u = 0 on its edge, in float64."""
    sizes, rng = (2, 64, 64, 48, 48, 1), np.random.default_rng(0)
    inside = np.arange(interior + edge) < interior
    points = rng.uniform(size=(interior + edge, 2))
    side = np.arange(edge) % 4
    points[interior + np.arange(edge), side // 2] = side % 2

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        layers = []
        for a, b in itertools.pairwise(sizes):
            bound = a**-0.5
            draw = functools.partial(rng.uniform, -bound, bound)
            layers.append({"w": draw((a, b)), "b": draw(b)})
        return layers

    def residuals(params: Any, batch: Any) -> jax.Array:
        u = lambda x: mlp(params, x)[0]

        def at(x: jax.Array, inside: jax.Array) -> jax.Array:
            second = lambda e: jax.jvp(lambda x: jax.jvp(u, (x,), (e,))[1], (x,), (e,))[1]
            laplacian = jax.vmap(second)(jnp.eye(2)).sum()
            solution = jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
            return jnp.where(inside, -laplacian - 2 * jnp.pi**2 * solution, u(x))

        return jax.vmap(at)(batch["x"], batch["inside"])[:, None]

    return Task(
        "poisson",
        "gaussian",
        init,
        residuals,
        {"x": points, "inside": inside},
        np.zeros((interior + edge, 1)),
        steps=500,
        weights=np.where(inside, 1 / interior, 1 / edge),  # the mean of each kind
        x64=True,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "digits": functools.partial(digits, "digits", None, 2000),
    "digits-256": functools.partial(digits, "digits-256", 256, 3000),
    "digits-64": functools.partial(digits, "digits-64", 64, 3000),
    "digits-cnn": digits_cnn,
    "breast-cancer": breast_cancer,
    "diabetes": diabetes,
    "curves": curves,
    "transformer": transformer,
    "poisson": poisson,
}
UNTRAINABLE = {"wide": wide}  # for costs alone
