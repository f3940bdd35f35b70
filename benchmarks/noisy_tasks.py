"""Tasks of mini-batches, for noise.py: all data is drawn here, or comes with a package.

The rule for noise was chosen on the development tasks; the validation tasks were first run when it
stood.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tasks
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from tasks import init_mlp, mlp

import fvp


@dataclasses.dataclass(frozen=True)
class NoisyTask:
    """A model and its training set; ``steps`` batches of ``batch_size`` drawn with replacement."""

    model_fn: Callable[[Any, Any], jax.Array]
    head: fvp.Head
    init: Callable[[int], Any]  # seed -> params
    inputs: np.ndarray
    targets: np.ndarray
    batch_size: int
    steps: int
    evaluated: int = 2000  # rows

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets."""
        return self.inputs, self.targets


def single(tree: Any) -> Any:
    """Every leaf in float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def images(batch_size: int, steps: int, relabelled: float = 0.0) -> NoisyTask:
    """Ten random curves, stretched, shifted and scaled in a noisy line of 40 pixels."""
    rng, count, length = np.random.default_rng(0), 4000, 40
    curves = rng.normal(size=(10, 12)).cumsum(1)
    curves = (curves - curves.mean(1, keepdims=True)) / curves.std(1, keepdims=True)
    labels = rng.integers(0, 10, count)
    x = 0.25 * rng.normal(size=(count, length))
    for row, label in zip(x, labels, strict=True):
        size = rng.integers(10, 18)
        curve = np.interp(np.linspace(0, 11, size), np.arange(12), curves[label])
        start = rng.integers(0, length - size)
        row[start : start + size] += rng.uniform(0.7, 1.3) * curve
    other = rng.uniform(size=count) < relabelled
    labels = np.where(other, rng.integers(0, 10, count), labels)
    init = functools.partial(init_mlp, (length, 100, 100, 10))
    return NoisyTask(mlp, fvp.Softmax(), init, x, labels, batch_size, steps)


def factorisation() -> NoisyTask:
    """A matrix of rank five from a part of its entries: a batch reads few rows of the tables."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(200, 5)), rng.normal(size=(150, 5)) / math.sqrt(5)
    rows, columns = rng.integers(0, 200, 20_000), rng.integers(0, 150, 20_000)
    entries = (left[rows] * right[columns]).sum(1) + 0.1 * rng.normal(size=20_000)

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {"left": 0.1 * rng.normal(size=(200, 8)), "right": 0.1 * rng.normal(size=(150, 8))}

    def model_fn(params: Any, x: Any) -> jax.Array:
        product = params["left"][x[:, 0]] * params["right"][x[:, 1]]
        return product.sum(1, keepdims=True)

    where = np.stack([rows, columns], 1)
    return NoisyTask(model_fn, fvp.Gaussian(), init, where, entries[:, None], 256, 2000)


def outliers() -> NoisyTask:
    """Regression where one target in fifty is off by twenty standard deviations."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 10))
    y = np.tanh(x @ rng.normal(size=(10, 20))) @ rng.normal(size=(20, 1))
    y += 0.05 * rng.normal(size=y.shape)
    wrong = rng.uniform(size=4000) < 0.02
    y[wrong] += 20 * rng.normal(size=(wrong.sum(), 1))
    init = functools.partial(init_mlp, (10, 64, 64, 1))
    return NoisyTask(mlp, fvp.Gaussian(), init, x, y, 32, 3000)


def experts() -> NoisyTask:
    """A mixture of eight experts, of which a gather takes two for each example."""
    rng = np.random.default_rng(0)
    x, maps = rng.normal(size=(5000, 16)), rng.normal(size=(8, 16, 5))
    chosen = (x @ rng.normal(size=(16, 8))).argmax(1)
    labels = np.einsum("ni,nio->no", x, maps[chosen]).argmax(1)

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {
            "gate": 0.3 * rng.normal(size=(16, 8)),
            "in": rng.normal(size=(8, 16, 32)) / 4,
            "out": rng.normal(size=(8, 32, 5)) / 6,
        }

    def model_fn(params: Any, x: Any) -> jax.Array:
        top, index = jax.lax.top_k(x @ params["gate"], 2)
        hidden = jax.nn.relu(jnp.einsum("ni,nkio->nko", x, params["in"][index]))
        outputs = jnp.einsum("nki,nkio->nko", hidden, params["out"][index])
        return jnp.sum(jax.nn.softmax(top)[..., None] * outputs, axis=1)

    return NoisyTask(model_fn, fvp.Softmax(), init, x, labels, 128, 2000)


def words() -> NoisyTask:
    """Counts of 1,500 words, most of them rare, and the topics of a text, several at a time."""
    rng = np.random.default_rng(0)
    themes = rng.dirichlet(np.full(20, 0.2), 4000)
    vocabulary = rng.dirichlet(np.full(1500, 0.05), 20)
    x = np.stack([rng.multinomial(60, weights @ vocabulary) for weights in themes]).astype(float)
    y = (themes > 0.15).astype(float)
    init = functools.partial(init_mlp, (1500, 32, 20))
    return NoisyTask(mlp, fvp.Sigmoid(), init, x, y, 64, 1500)


def convolutional_images() -> NoisyTask:
    """The curves again, read by a small convolutional network."""

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed + 1)
        he = lambda *shape: rng.normal(size=shape) * math.sqrt(2 / math.prod(shape[:-1]))
        weights = {"one": he(5, 1, 12), "two": he(5, 12, 24), "out": he(24, 10)}
        return {**weights, "bias": np.zeros(10)}

    def model_fn(params: Any, x: Any) -> jax.Array:
        x = x[:, :, None]
        for name in ("one", "two"):
            numbers = ("NWC", "WIO", "NWC")
            x = jax.lax.conv_general_dilated(
                x, params[name], (2,), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(x)
        return x.mean(1) @ params["out"] + params["bias"]

    return dataclasses.replace(images(16, 3000), model_fn=model_fn, init=init)


def autoencoder() -> NoisyTask:
    """Handwritten digits through six numbers and back, pixel by pixel."""
    x = np.asarray(load_digits(return_X_y=True)[0]) / 16
    init = functools.partial(init_mlp, (64, 32, 6, 32, 64))
    return NoisyTask(mlp, fvp.Sigmoid(), init, x, x, 32, 3000)


def prose(context: int, count: int) -> tuple[np.ndarray, int]:
    """Windows of ``context`` + 1 letters of English, in random order; the size of the alphabet."""
    text = " ".join(topics.values())[:count].lower()
    alphabet, codes = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, context + 1)
    return np.random.default_rng(0).permutation(windows), len(alphabet)


def letters() -> NoisyTask:
    """The next letter of English prose after eight, whose embeddings are concatenated."""
    windows, size = prose(8, 60_000)

    def init(seed: int) -> Any:
        table = np.random.default_rng(seed).normal(size=(size, 8))
        return {"table": table, "mlp": init_mlp((64, 96, size), seed)}

    def model_fn(params: Any, x: Any) -> jax.Array:
        return mlp(params["mlp"], params["table"][x].reshape(len(x), -1))

    return NoisyTask(model_fn, fvp.Softmax(), init, windows[:, :8], windows[:, 8], 32, 3000)


def recurrent() -> NoisyTask:
    """Every next letter of 24, read by a gated recurrent unit."""
    (windows, size), width = prose(24, 60_000), 48

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        dense = lambda a, b: rng.normal(size=(a, b)) / math.sqrt(a)
        return {
            "table": rng.normal(size=(size, width)),
            "gates": dense(2 * width, 2 * width),
            "bias": np.zeros(2 * width),
            "candidate": dense(2 * width, width),
            "out": dense(width, size),
        }

    def model_fn(params: Any, x: Any) -> jax.Array:
        def step(h: Any, letter: Any) -> Any:
            x = params["table"][letter]
            gates = jnp.concatenate([x, h], 1) @ params["gates"] + params["bias"]
            update, reset = jnp.split(jax.nn.sigmoid(gates), 2, axis=1)
            new = jnp.tanh(jnp.concatenate([x, reset * h], 1) @ params["candidate"])
            h = update * h + (1 - update) * new
            return h, h @ params["out"]

        return jax.lax.scan(step, jnp.zeros((len(x), width)), x.T)[1].swapaxes(0, 1)

    return NoisyTask(model_fn, fvp.Softmax(), init, windows[:, :-1], windows[:, 1:], 32, 1000)


def transformer() -> NoisyTask:
    """That of tasks.py."""
    task = tasks.transformer()
    x, y = np.asarray(task.inputs), np.asarray(task.targets)
    return NoisyTask(task.model_fn, fvp.Softmax(), task.init, x, y, 32, 400, evaluated=256)


def digits(batch_size: int) -> NoisyTask:
    """Handwritten digits, 64-128-10."""
    task = tasks.digits("digits", batch_size, 1000)
    x, y = np.asarray(task.inputs), np.asarray(task.targets)
    return NoisyTask(task.model_fn, fvp.Softmax(), task.init, x, y, batch_size, 1000)


def counts() -> NoisyTask:
    """Counts whose logarithmic rate is a network of eight numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 8))
    rate = np.tanh(x @ rng.normal(size=(8, 16))) @ rng.normal(size=(16, 1)) / 2
    init = functools.partial(init_mlp, (8, 48, 48, 1))
    return NoisyTask(mlp, fvp.Poisson(), init, x, rng.poisson(np.exp(rate)), 32, 2000)


def tumours() -> NoisyTask:
    """Logistic regression of breast cancer, in batches of eight."""
    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    init = functools.partial(init_mlp, (30, 1))
    return NoisyTask(mlp, fvp.Sigmoid(), init, x, y[:, None].astype(float), 8, 2000)


def diabetes() -> NoisyTask:
    """Regression of the progress of diabetes, in batches of sixteen."""
    x, y = map(np.asarray, load_diabetes(return_X_y=True))
    y = (y - y.mean()) / y.std()
    init = functools.partial(init_mlp, (10, 50, 50, 1))
    return NoisyTask(mlp, fvp.Gaussian(), init, 20 * x, y[:, None], 16, 2000)


def deep_images() -> NoisyTask:
    """The curves again, read by twelve residual layers."""

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        dense = lambda a, b: rng.normal(size=(a, b)) / math.sqrt(a)
        layers = [{"in": dense(32, 32), "out": dense(32, 32) / 4} for _ in range(12)]
        return {"read": dense(40, 32), "layers": layers, "out": dense(32, 10)}

    def model_fn(params: Any, x: Any) -> jax.Array:
        x = x @ params["read"]
        for layer in params["layers"]:
            x = x + jax.nn.relu(x @ layer["in"]) @ layer["out"]
        return x @ params["out"]

    return dataclasses.replace(images(32, 2000), model_fn=model_fn, init=init)


def sets() -> NoisyTask:
    """Which of eight kinds most of twelve symbols are, told by one layer of attention."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (4000, 12))
    kinds = rng.integers(0, 8, 40)[x]
    labels = np.array([np.bincount(row, minlength=8).argmax() for row in kinds])

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        dense = lambda a, b: rng.normal(size=(a, b)) / math.sqrt(a)
        names = ("query", "key", "value")
        heads = {name: dense(24, 24) for name in names}
        rest = {"scale": np.ones(24), "up": dense(24, 48), "out": dense(48, 8)}
        return {"table": rng.normal(size=(40, 24)), **heads, **rest}

    def model_fn(params: Any, x: Any) -> jax.Array:
        x = params["table"][x]
        query, key, value = (x @ params[name] for name in ("query", "key", "value"))
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key) / math.sqrt(24))
        x = (x + scores @ value).mean(1)
        x = x - x.mean(-1, keepdims=True)
        x = params["scale"] * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return jax.nn.gelu(x @ params["up"]) @ params["out"]

    return NoisyTask(model_fn, fvp.Softmax(), init, x, labels, 16, 2000)


DEVELOPMENT: dict[str, Callable[[], NoisyTask]] = {
    "digits, batch 1": lambda: digits(1),
    "digits, batch 4": lambda: digits(4),
    "digits, batch 8": lambda: digits(8),
    "digits, batch 32": lambda: digits(32),
    "images, noisy labels": lambda: images(64, 4000, relabelled=0.3),
    "images": lambda: images(64, 4000),
    "images, batch 8": lambda: images(8, 8000),
    "factorisation": factorisation,
    "outliers": outliers,
    "experts": experts,
    "words": words,
    "transformer": transformer,
    "convolutional network": convolutional_images,
    "autoencoder": autoencoder,
    "letters": letters,
    "recurrent network": recurrent,
}
VALIDATION: dict[str, Callable[[], NoisyTask]] = {
    "counts": counts,
    "tumours": tumours,
    "diabetes": diabetes,
    "deep images": deep_images,
    "sets": sets,
}
