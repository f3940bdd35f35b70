"""Mini-batches: fvp with nothing set beside tuned optimizers, on tasks that need no data set.

    python benchmarks/noise.py
    python benchmarks/noise.py --tasks "images, noisy labels" factorisation --methods fvp adam

Each method trains on the same batches; printed is the training loss on a fixed evaluation set after
all steps, and CPU seconds without compilation. The learning rates of Adam and Muon are tuned, over
six and four values, by that loss. All data is drawn here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tasks import init_mlp, mlp
from tqdm import tqdm

import fvp

CHUNKS = 10  # evaluations of a run
EVALUATED = 2000


@dataclasses.dataclass(frozen=True)
class NoisyTask:
    """A model and its training set; ``steps`` batches of ``batch_size`` drawn with replacement."""

    model_fn: Callable[[Any, Any], jax.Array]
    head: fvp.Head
    params: Any
    inputs: np.ndarray
    targets: np.ndarray
    batch_size: int
    steps: int

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
    params = init_mlp((length, 100, 100, 10), 0)
    return NoisyTask(mlp, fvp.Softmax(), params, x, labels, batch_size, steps)


def factorisation() -> NoisyTask:
    """A matrix of rank five from a part of its entries: a batch reads few rows of the tables."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(200, 5)), rng.normal(size=(150, 5)) / math.sqrt(5)
    rows, columns = rng.integers(0, 200, 20_000), rng.integers(0, 150, 20_000)
    entries = (left[rows] * right[columns]).sum(1) + 0.1 * rng.normal(size=20_000)
    params = {"left": 0.1 * rng.normal(size=(200, 8)), "right": 0.1 * rng.normal(size=(150, 8))}

    def model_fn(params: Any, x: Any) -> jax.Array:
        product = params["left"][x[:, 0]] * params["right"][x[:, 1]]
        return product.sum(1, keepdims=True)

    where = np.stack([rows, columns], 1)
    return NoisyTask(model_fn, fvp.Gaussian(), params, where, entries[:, None], 256, 2000)


def outliers() -> NoisyTask:
    """Regression where one target in fifty is off by twenty standard deviations."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 10))
    y = np.tanh(x @ rng.normal(size=(10, 20))) @ rng.normal(size=(20, 1))
    y += 0.05 * rng.normal(size=y.shape)
    wrong = rng.uniform(size=4000) < 0.02
    y[wrong] += 20 * rng.normal(size=(wrong.sum(), 1))
    return NoisyTask(mlp, fvp.Gaussian(), init_mlp((10, 64, 64, 1), 0), x, y, 32, 3000)


def experts() -> NoisyTask:
    """A mixture of eight experts, of which a gather takes two for each example."""
    rng = np.random.default_rng(0)
    x, maps = rng.normal(size=(5000, 16)), rng.normal(size=(8, 16, 5))
    chosen = (x @ rng.normal(size=(16, 8))).argmax(1)
    labels = np.einsum("ni,nio->no", x, maps[chosen]).argmax(1)
    params = {
        "gate": 0.3 * rng.normal(size=(16, 8)),
        "in": rng.normal(size=(8, 16, 32)) / 4,
        "out": rng.normal(size=(8, 32, 5)) / 6,
    }

    def model_fn(params: Any, x: Any) -> jax.Array:
        top, index = jax.lax.top_k(x @ params["gate"], 2)
        hidden = jax.nn.relu(jnp.einsum("ni,nkio->nko", x, params["in"][index]))
        outputs = jnp.einsum("nki,nkio->nko", hidden, params["out"][index])
        return jnp.sum(jax.nn.softmax(top)[..., None] * outputs, axis=1)

    return NoisyTask(model_fn, fvp.Softmax(), params, x, labels, 128, 2000)


def words() -> NoisyTask:
    """Counts of 1,500 words, most of them rare, and the topics of a text, several at a time."""
    rng = np.random.default_rng(0)
    topics, vocabulary = (
        rng.dirichlet(np.full(20, 0.2), 4000),
        rng.dirichlet(np.full(1500, 0.05), 20),
    )
    x = np.stack([rng.multinomial(60, weights @ vocabulary) for weights in topics]).astype(float)
    y = (topics > 0.15).astype(float)
    return NoisyTask(mlp, fvp.Sigmoid(), init_mlp((1500, 32, 20), 0), x, y, 64, 1500)


def convolutional_images() -> NoisyTask:
    """The curves again, read by a small convolutional network."""
    task, rng = images(16, 3000), np.random.default_rng(1)
    he = lambda *shape: rng.normal(size=shape) * math.sqrt(2 / math.prod(shape[:-1]))
    params = {"one": he(5, 1, 12), "two": he(5, 12, 24), "out": he(24, 10), "bias": np.zeros(10)}

    def model_fn(params: Any, x: Any) -> jax.Array:
        x = x[:, :, None]
        for name in ("one", "two"):
            numbers = ("NWC", "WIO", "NWC")
            x = jax.lax.conv_general_dilated(
                x, params[name], (2,), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(x)
        return x.mean(1) @ params["out"] + params["bias"]

    return dataclasses.replace(task, model_fn=model_fn, params=params)


def autoencoder() -> NoisyTask:
    """Handwritten digits through six numbers and back, pixel by pixel."""
    x = load_digits(return_X_y=True)[0] / 16
    return NoisyTask(mlp, fvp.Sigmoid(), init_mlp((64, 32, 6, 32, 64), 0), x, x, 32, 3000)


def letters() -> NoisyTask:
    """The next letter of English prose after eight, whose embeddings are concatenated."""
    text = " ".join(topics.values())[:60_000].lower()
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(letter) for letter in text])
    windows = np.lib.stride_tricks.sliding_window_view(codes, 9)
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(len(alphabet), 8)),
        "mlp": init_mlp((64, 96, len(alphabet)), 0),
    }

    def model_fn(params: Any, x: Any) -> jax.Array:
        return mlp(params["mlp"], params["table"][x].reshape(len(x), -1))

    x, y = windows[:, :8], windows[:, 8]
    order = rng.permutation(len(x))
    return NoisyTask(model_fn, fvp.Softmax(), params, x[order], y[order], 32, 3000)


TASKS: dict[str, Callable[[], NoisyTask]] = {
    "images, noisy labels": lambda: images(64, 4000, relabelled=0.3),
    "images": lambda: images(64, 4000),
    "images, batch 8": lambda: images(8, 8000),
    "factorisation": factorisation,
    "outliers": outliers,
    "experts": experts,
    "words": words,
    # What follows was first run when the rule stood.
    "convolutional network": convolutional_images,
    "autoencoder": autoencoder,
    "letters": letters,
}

# For each method the transformations to try, of which the best counts.
METHODS: dict[str, Callable[[NoisyTask], list[optax.GradientTransformation]]] = {
    "fvp": lambda task: [fvp.natural_gradient(1.0, task.model_fn, task.head)],
    "K-FAC": lambda task: [
        optax.chain(fvp.scale_by_kfac(task.model_fn, task.head), optax.scale(-1.0))
    ],
    "adam": lambda task: [optax.adam(rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    "muon": lambda task: [optax.contrib.muon(rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)],
}


def train(task: NoisyTask, tx: optax.GradientTransformation) -> tuple[float, float]:
    """The loss on the evaluation set at the end, and CPU seconds."""
    tx, params = optax.with_extra_args_support(tx), single(task.params)
    x, y = (jnp.asarray(v, jnp.int32 if v.dtype.kind == "i" else jnp.float32) for v in task.data)

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        return task.head.nll(task.model_fn(params, x), y).mean()

    @jax.jit
    def chunk(params: Any, state: Any, key: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            params, state = carry
            rows = jax.random.randint(key, (task.batch_size,), 0, len(x))
            gradient = jax.grad(loss)(params, x[rows], y[rows])
            batch = {"batch": x[rows], "targets": y[rows]}
            updates, state = tx.update(gradient, state, params, **batch)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, task.steps // CHUNKS)
        return jax.lax.scan(step, (params, state), keys)[0]

    state, keys = tx.init(params), jax.random.split(jax.random.key(1), CHUNKS)
    compiled = chunk.lower(params, state, keys[0]).compile()
    start = time.process_time()
    for key in keys:
        params, state = jax.block_until_ready(compiled(params, state, key))
    seconds = time.process_time() - start
    return float(loss(params, x[:EVALUATED], y[:EVALUATED])), seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    print(f"| task | {' | '.join(arguments.methods)} |\n|{'---|' * (len(arguments.methods) + 1)}")
    for name in tqdm(arguments.tasks, unit="task"):
        task, cells = TASKS[name](), []
        for method in arguments.methods:
            runs = [train(task, tx) for tx in METHODS[method](task)]
            best, seconds = min(runs, key=lambda run: (not math.isfinite(run[0]), run[0]))
            cells.append(f"{best:.3g}, {seconds:.1f} s")
        tqdm.write(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
