"""What Fisher information is: the curvature of the divergence, and the covariance of the score.

    python examples/information.py

For a small network on handwritten digits, halfway through its training. Draws the exact
divergence along a natural gradient beside its quadratic approximation, and how the mean score, the
covariance of the scores and the mean Hessian of simulated labels approach zero, F and F.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD, DAMPING = fvp.Softmax(), 1e-3


def model(params, x):
    return jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["out"]


def digits(components):
    """Images by their first principal components, standardized, and labels."""
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(PCA(components, whiten=True).fit_transform(images)), jnp.asarray(labels)


def train(params, x, y, steps):
    tx = fvp.natural_gradient(1.0, model, HEAD)
    state = tx.init(params)
    for _ in range(steps):
        gradient = jax.grad(lambda p: HEAD.nll(model(p, x), y).mean())(params)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        params = optax.apply_updates(params, updates)
    return params


def divergences(params, x, y, lengths):
    """Exact and quadratic, at multiples of the natural gradient."""
    F = fvp.fisher(model, HEAD, params, x)
    direction, _ = fvp.cg(F, F.value_and_grad(y)[1], damping=DAMPING)
    moved = lambda t: jax.tree.map(lambda p, d: p - t * d, params, direction)
    exact = jax.lax.map(
        lambda t: fvp.kl_divergence(model, HEAD, params, moved(t), x), jnp.asarray(lengths)
    )
    return exact, lengths**2 * F.quadratic_form(direction) / 2


def identities(params, x, count):
    """How far means over ``count`` draws of all labels from the model are from what they approach.

    The score from 0, by its typical length; covariance of scores and Hessian from F, by its norm.
    """
    F = fvp.fisher(model, HEAD, params, x).dense()
    away = lambda matrix: jnp.linalg.norm(matrix - F) / jnp.linalg.norm(F)

    @jax.jit
    def drawn(key):
        y = HEAD.sample(key, model(params, x))
        H = fvp.hessian(model, HEAD, params, x, y)
        score = ravel_pytree(H.value_and_grad(y)[1])[0]
        return score, fvp.empirical_fisher(model, HEAD, params, x, y).dense(), H.dense()

    total, distances = jax.tree.map(jnp.zeros_like, drawn(jax.random.key(0))), []
    for number, key in enumerate(tqdm(jax.random.split(jax.random.key(1), count), "labels"), 1):
        total = jax.tree.map(jnp.add, total, drawn(key))
        score, covariance, hessian = (x / number for x in total)
        length = jnp.linalg.norm(score) / jnp.sqrt(jnp.trace(F) / len(x))
        distances.append([length, away(covariance), away(hessian)])
    return np.asarray(distances)


def draw(lengths, exact, quadratic, distances, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.loglog(lengths, exact, label=r"divergence from $p_\theta$ to $p_{\theta - td}$")
    left.loglog(lengths, quadratic, "--", label=r"$\frac{1}{2}\, t^2\, d^\top F\, d$")
    left.set(xlabel="multiple $t$ of the natural gradient $d$", ylabel="nats per example")
    left.legend(frameon=False)
    number = np.arange(1, len(distances) + 1)
    names = ("mean score from 0", "covariance of scores from $F$", "mean Hessian from $F$")
    for name, distance in zip(names, distances.T, strict=True):
        right.loglog(number, distance, label=name)
    right.loglog(number, 1 / np.sqrt(number), ":", color="0.6", label=r"$1/\sqrt{\mathrm{draws}}$")
    right.set(xlabel="draws of the labels", ylabel="relative distance")
    right.set_ylim(bottom=1e-4)
    right.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps before")
    parser.add_argument("--draws", type=int, default=1000, help="draws of all labels")
    parser.add_argument("--output", type=Path, default=Path("out/information.png"))
    arguments = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    x, y = digits(components=5)
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {"hidden": {"w": normal(0, 5, 4), "b": jnp.zeros(4)}, "out": normal(1, 4, 10)}
    params = train(params, x, y, arguments.steps)
    lengths = np.logspace(-3, 0.5, 40)
    exact, quadratic = divergences(params, x, y, lengths)
    distances = identities(params, x, arguments.draws)
    F = fvp.fisher(model, HEAD, params, x)
    E = fvp.empirical_fisher(model, HEAD, params, x, y)
    gradient = F.value_and_grad(y)[1]
    apart = fvp.compare_curvatures(F, E, gradient, jax.random.key(2), damping=DAMPING)
    print(
        f"the empirical Fisher is {100 * apart.difference:.0f}% away from the Fisher, and its"
        f" natural gradient {np.degrees(np.arccos(apart.step_cosine)):.0f} degrees"
    )
    draw(lengths, exact, quadratic, distances, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
