"""Wrong labels among handwritten digits, found by their influence on a few that were checked.

    python examples/influence.py

A tenth of the training labels are replaced by wrong ones. Examples are ranked by what they do to
the loss on validation images: by influence scores, and by plain inner products of the gradients.
Draws precision against recall of both.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD, HIDDEN = fvp.Softmax(), 32
L2 = 3e-3


def model(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def initial(key):
    layer = lambda key, i, o: {
        "w": jax.random.normal(key, (i, o)) / np.sqrt(i),
        "b": jnp.zeros(o),
    }
    first, last = jax.random.split(key)
    return {"hidden": layer(first, 64, HIDDEN), "out": layer(last, HIDDEN, 10)}


def train(params, x, y, steps):
    """The minimum of the mean loss and 1/2 L2 |params|^2."""
    tx = fvp.natural_gradient(1.0, model, HEAD, l2=L2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: HEAD.nll(model(p, x), y).mean())(params)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in tqdm(range(steps), "training"):
        params, state = step(params, state)
    return params


def influence_on(params, x, y, queries, query_labels, size=10):
    """The influence of each training example on the mean loss of the queries."""
    options = {"damping": L2, "train_targets": y}
    total = np.zeros(len(x))
    for start in tqdm(range(0, len(queries), size), "queries"):
        some = slice(start, start + size)
        scores = fvp.influence(
            model, HEAD, params, x, queries[some], query_targets=query_labels[some], **options
        )
        total += np.asarray(scores).sum(0)
    return total / len(queries)


def inner_products(params, x, y, queries, query_labels):
    """The same with the identity for a curvature."""
    loss = lambda params, x, y: HEAD.nll(model(params, x), y).mean()
    wanted = jax.grad(loss)(params, queries, query_labels)
    single = lambda x, y: jax.jvp(lambda p: loss(p, x[None], y[None]), (params,), (wanted,))[1]
    return -np.asarray(jax.vmap(single)(x, y))


def draw(scores, wrong, path):
    """Precision against recall, examples with the most harmful scores first."""
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, score in scores.items():
        precision, recall, _ = precision_recall_curve(wrong, score)
        average = average_precision_score(wrong, score)
        axes.plot(recall, precision, label=f"{name}: mean precision {average:.2f}")
    axes.axhline(wrong.mean(), color="0.7", linestyle=":", label="by chance")
    axes.set(xlabel="recall of wrong labels", ylabel="precision", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--examples", type=int, default=600, help="training examples")
    parser.add_argument("--queries", type=int, default=60, help="validation images")
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("out/influence.png"))
    arguments = parser.parse_args()

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images, rng = (pixels / 16).astype(np.float32), np.random.default_rng(0)
    split = {"train_size": arguments.examples, "test_size": arguments.queries, "random_state": 0}
    x, queries, y, query_labels = train_test_split(images, labels, **split)
    wrong = rng.random(len(y)) < 0.1
    y = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    params = train(initial(jax.random.key(0)), x, y, arguments.steps)
    data = (params, x, y, queries, query_labels)
    scores = {"influence": influence_on(*data), "gradient products": inner_products(*data)}
    # The loss of a query grows with the influence of an example: wrong labels have the largest.
    for name, score in scores.items():
        first = np.argsort(-score)[: wrong.sum()]
        print(f"{name}: {wrong[first].mean():.2f} of the first {wrong.sum()} are wrong")
    draw(scores, wrong, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
