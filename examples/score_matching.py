"""A denoising score model of two moons, trained by the natural gradient with nothing set.

    python examples/score_matching.py

The network predicts the noise in a point at a given noise level: least squares, so that the head is
Gaussian. Points are then drawn by the probability-flow equation, from the largest level down. Draws
data, samples and scores; prints the energy distance of the samples to points held out, beside that
of as many points of the data, and the loss that Adam comes to in as many steps.

Reference: P. Vincent, A connection between score matching and denoising autoencoders, 2011;
Y. Song et al., Score-based generative modeling through stochastic differential equations, 2021.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy.spatial.distance import cdist
from sklearn.datasets import make_moons
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD, WIDTHS = fvp.Gaussian(), (3, 64, 64, 2)
LEVELS = np.geomspace(5.0, 0.05, 60, dtype=np.float32)  # standard deviations of the noise


def initial(key):
    layer = lambda key, i, o: {
        "w": jax.random.normal(key, (i, o)) / np.sqrt(i),
        "b": jnp.zeros(o),
    }
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [layer(k, i, o) for k, (i, o) in zip(keys, pairwise(WIDTHS), strict=True)]


def predicted_noise(params, batch):
    x, level = batch
    level = level[:, None]
    hidden = jnp.concatenate([x / jnp.sqrt(1 + level**2), jnp.log(level)], axis=1)
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return hidden @ params[-1]["w"] + params[-1]["b"]


def noised(x, key):
    """Every point at a random level, and the noise in it."""
    which, noise = jax.random.split(key)
    level = jax.random.choice(which, jnp.asarray(LEVELS), x.shape[:1])
    noise = jax.random.normal(noise, x.shape)
    return (x + level[:, None] * noise, level), noise


def loss(params, batch, noise):
    return HEAD.nll(predicted_noise(params, batch), noise).mean()


def train(tx, x, steps):
    """The trained parameters; every step sees all points, with noise of its own."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, key):
        batch, noise = noised(x, key)
        value, gradient = jax.value_and_grad(loss)(params, batch, noise)
        updates, state = tx.update(gradient, state, params, batch=batch, targets=noise)
        return optax.apply_updates(params, updates), state, value

    params = initial(jax.random.key(0))
    state = tx.init(params)
    for key in (progress := tqdm(jax.random.split(jax.random.key(1), steps), "training")):
        params, state, value = step(params, state, key)
        progress.set_postfix(loss=f"{float(value):.3f}")
    return params


@jax.jit
def score(params, x, level):
    """Of the density of the data with noise of that level: -noise / level."""
    return -predicted_noise(params, (x, jnp.full(len(x), level))) / level


@jax.jit
def sample(params, z):
    """The probability-flow equation dx / dlevel = -level score, by Heun's steps."""

    def step(x, levels):
        before, after = levels
        slope = -before * score(params, x, before)
        ahead = x + (after - before) * slope
        slope = (slope - after * score(params, ahead, after)) / 2
        return x + (after - before) * slope, None

    levels = jnp.asarray(LEVELS)
    start = jnp.sqrt(1 + levels[0] ** 2) * z  # the data are of variance one
    return jax.lax.scan(step, start, (levels[:-1], levels[1:]))[0]


def energy_distance(x, y):
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


def draw(x, samples, params, path):
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4), layout="constrained", sharex=True, sharey=True
    )
    for panel, points, title in ((axes[0], x, "data"), (axes[1], samples, "samples")):
        panel.plot(*points[:2000].T, ".", markersize=2)
        panel.set(title=title)
    level, axis = 0.3, np.linspace(-2.5, 2.5, 25, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    axes[2].plot(*x.T, ".", color="0.8", markersize=2)
    axes[2].quiver(*grid.T, *score(params, grid, level).T, width=0.003)
    axes[2].set(title=f"score of the data with noise of {level}")
    for panel in axes:
        panel.set(aspect="equal", xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--adam", type=float, default=0.01, help="learning rate of Adam")
    parser.add_argument("--output", type=Path, default=Path("out/score_matching.png"))
    arguments = parser.parse_args()

    points = np.asarray(make_moons(10_000, noise=0.08, random_state=0)[0])
    points = (points - points.mean(0)) / points.std(0)
    x, held_out, others = np.split(points.astype(np.float32), [2000, 6000])
    transformations = {
        "natural gradient": fvp.natural_gradient(1.0, predicted_noise, HEAD),
        "Adam": optax.adam(arguments.adam),
    }
    fitted = {name: train(tx, x, arguments.steps) for name, tx in transformations.items()}
    z = jax.random.normal(jax.random.key(2), held_out.shape)
    samples = {name: np.asarray(sample(params, z)) for name, params in fitted.items()}
    batch, noise = noised(np.tile(held_out, (10, 1)), jax.random.key(3))
    print(f"energy distance of data to points held out: {energy_distance(others, held_out):.4f}")
    for name, params in fitted.items():
        distance = energy_distance(samples[name], held_out)
        held_out_loss = float(loss(params, batch, noise))
        print(f"{name:16}: of samples {distance:.4f}, loss held out {held_out_loss:.4f}")
    draw(x, samples["natural gradient"], fitted["natural gradient"], arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
