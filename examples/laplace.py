"""What a classifier of handwritten digits does not know: Laplace's approximation with K-FAC.

    python examples/laplace.py

Trains a network on noisy images of 0 to 7, few of them, until it knows them by heart, and chooses
the prior precision by the loss of the posterior on validation images. Draws how well the
probabilities are calibrated, and how the digits 8 and 9, which it has never seen, are told from the
others: by the most likely class of the network alone, and of the posterior.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD, HIDDEN, CLASSES = fvp.Softmax(), 64, 8
PRIOR_PRECISION = 0.02  # in training: next to none


def model(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def initial(key):
    layer = lambda key, i, o: {
        "w": jax.random.normal(key, (i, o)) / np.sqrt(i),
        "b": jnp.zeros(o),
    }
    first, last = jax.random.split(key)
    return {"hidden": layer(first, 64, HIDDEN), "out": layer(last, HIDDEN, CLASSES)}


def train(params, x, y, prior_precision, steps):
    """The minimum of the summed loss and 1/2 prior_precision |params|^2."""
    l2 = prior_precision / len(x)
    tx = fvp.natural_gradient(1.0, model, HEAD, l2=l2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: HEAD.nll(model(p, x), y).mean())(params)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in tqdm(range(steps), "training"):
        params, state = step(params, state)
    return params


def tune(posterior, x, y, key):
    """The posterior with the prior precision of the lowest loss on ``x``; one curvature for all."""
    found = []
    for precision in (progress := tqdm(np.logspace(-1, 3, 13), "prior precision")):
        candidate = posterior.with_prior_precision(precision)
        found.append((loss(candidate.predictive_mean(x, key), y), precision))
        progress.set_postfix(precision=f"{precision:.3g}", loss=f"{found[-1][0]:.3f}")
    return posterior.with_prior_precision(min(found)[1])


def loss(probabilities, y):
    return -float(np.log(np.asarray(probabilities)[np.arange(len(y)), y]).mean())


def calibration(probabilities, y, bins=8):
    """Confidence and accuracy of bins of equally many examples, and their mean distance."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == y
    groups = np.array_split(np.argsort(confidence), bins)
    points = np.array([(confidence[g].mean(), correct[g].mean()) for g in groups])
    return points, np.abs(points[:, 0] - points[:, 1]).mean()


def draw(results, y, path):
    """Reliability on known digits; the confidence in known and unknown ones."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    axes[0].plot([0, 1], [0, 1], "0.7")
    bins = np.linspace(1 / CLASSES, 1, 25)
    for number, (name, (known, unknown)) in enumerate(results.items()):
        points, error = calibration(known, y)
        axes[0].plot(*points.T, "o-", label=f"{name}: error {error:.3f}")
        axis = axes[1 + number]
        axis.hist(known.max(1), bins, alpha=0.6, density=True, label="0 to 7")
        axis.hist(unknown.max(1), bins, alpha=0.6, density=True, label="8 and 9")
        axis.set(title=f"{name}: area under ROC {separation(known, unknown):.3f}")
        axis.set(xlabel="probability of the most likely class", ylabel="density")
        axis.legend(frameon=False)
    axes[0].set(xlabel="confidence", ylabel="accuracy", title="calibration on 0 to 7")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def separation(known, unknown):
    """How often an unknown digit is less certain than a known one."""
    certainty = np.concatenate([known.max(1), unknown.max(1)])
    return roc_auc_score(np.r_[np.ones(len(known)), np.zeros(len(unknown))], certainty)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="training examples")
    parser.add_argument("--noise", type=float, default=0.4, help="standard deviation, of pixels")
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--structure", default="kfac", help="of the curvature: fvp.laplace")
    parser.add_argument("--output", type=Path, default=Path("out/laplace.png"))
    arguments = parser.parse_args()

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    images = (pixels / 16 + arguments.noise * noise).astype(np.float32)
    seen = labels < CLASSES
    split = {"train_size": arguments.examples, "random_state": 0}
    x, rest, y, rest_y = train_test_split(images[seen], labels[seen], **split)
    split["train_size"] = 200
    x_valid, x_test, y_valid, y_test = train_test_split(rest, rest_y, **split)
    params = train(initial(jax.random.key(0)), x, y, PRIOR_PRECISION, arguments.steps)
    options = {"prior_precision": PRIOR_PRECISION, "structure": arguments.structure}
    posterior, key = fvp.laplace(model, HEAD, params, x, **options), jax.random.key(1)
    posterior = tune(posterior, x_valid, y_valid, key)

    network = lambda x: np.asarray(HEAD.mean(model(params, x)))
    mean = lambda x: np.asarray(posterior.predictive_mean(x, key))
    results = {
        "network": (network(x_test), network(images[~seen])),
        "posterior": (mean(x_test), mean(images[~seen])),
    }
    for name, (known, unknown) in results.items():
        print(
            f"{name:9}: accuracy {np.mean(known.argmax(1) == y_test):.3f},"
            f" loss {loss(known, y_test):.3f},"
            f" calibration error {calibration(known, y_test)[1]:.3f},"
            f" unknown digits told apart {separation(known, unknown):.3f}"
        )
    draw(results, y_test, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
