"""Maximum likelihood of a mixture of Gaussians, by the natural gradient beside Adam.

    python examples/mixture.py

Fits four Gaussians that overlap. The metric is the Fisher of the density itself, from the scores of
points that the mixture draws, not of the data. Draws how far the mean negative log-likelihood is
above that of expectation maximisation, run to its end, against steps; and the densities.

Reference: S. Amari, Natural gradient works efficiently in learning, 1998.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMPONENTS = 4
TRUTH = {
    "logits": np.log([0.4, 0.3, 0.2, 0.1]),
    "mean": np.array([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0], [0.5, -1.5]]),
    "log_diagonal": np.log([[1.0, 2.0], [2.0, 1.0], [0.7, 3.0], [1.0, 4.0]]),
    "below": np.array([1.0, -1.5, 1.0, 2.0]),
}


def initial(key):
    """Round components of equal weight, with means at random."""
    return {
        "logits": jnp.zeros(COMPONENTS),
        "mean": jax.random.normal(key, (COMPONENTS, 2)),
        "log_diagonal": jnp.zeros((COMPONENTS, 2)),
        "below": jnp.zeros(COMPONENTS),
    }


def whitening(params):
    """W of each component: lower triangular, W (x - mean) is standard normal."""
    lower = params["below"][:, None, None] * jnp.array([[0.0, 0.0], [1.0, 0.0]])
    return lower + jnp.exp(params["log_diagonal"])[..., None] * jnp.eye(2)


def log_prob(params, x):
    """Of one point."""
    # Not of x - mean: on CPU jax 0.12.0 sums the derivative of that wrongly, see docs/versions.md.
    z = whitening(params) @ x - jnp.einsum("kij,kj->ki", whitening(params), params["mean"])
    normal = jax.scipy.stats.norm.logpdf(z).sum(1) + params["log_diagonal"].sum(1)
    return jax.nn.logsumexp(jax.nn.log_softmax(params["logits"]) + normal)


def sample(params, key):
    which, noise = jax.random.split(key)
    k = jax.random.categorical(which, params["logits"])
    z = jax.random.normal(noise, (2,))
    return params["mean"][k] + jnp.linalg.solve(whitening(params)[k], z)


def loss(params, x):
    """The mean negative log-likelihood of points."""
    return -log_probs(params, x).mean()


log_probs = jax.vmap(log_prob, (None, 0))


def train(tx, params, x, steps, draws):
    """The fitted parameters, and the loss before each step."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, key):
        value, gradient = jax.value_and_grad(loss)(params, x)
        # Adam reads none of the keywords, and the metric is then not computed.
        metric = fvp.density_fisher(log_prob, sample, params, key, draws)
        keywords = {"operator": metric, "batch": x, "value_fn": loss, "value": value}
        updates, state = tx.update(gradient, state, params, **keywords)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for key in (progress := tqdm(jax.random.split(jax.random.key(1), steps), "training")):
        params, state, value = step(params, state, key)
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return params, np.array(losses)


def draw(results, least, x, path):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    axis = np.linspace(-4.5, 4.5, 201)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    for panel, (name, (params, losses)) in zip(axes[1:], results.items(), strict=True):
        axes[0].semilogy(losses - least, label=name)
        density = np.exp(log_probs(params, grid.reshape(-1, 2))).reshape(grid.shape[:2])
        panel.plot(*x[::4].T, ".", color="0.6", markersize=2)
        panel.contour(axis, axis, density, levels=np.geomspace(0.002, 0.2, 8))
        panel.set(title=f"density: {name}", aspect="equal", xticks=[], yticks=[])
    axes[0].set(xlabel="step", ylabel="excess negative log-likelihood", ylim=(1e-10, 2))
    axes[0].grid(alpha=0.3)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=4000, help="of the mixture, for its Fisher")
    parser.add_argument("--adam", type=float, default=0.2, help="learning rate of Adam")
    parser.add_argument("--output", type=Path, default=Path("out/mixture.png"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    draws = jax.vmap(sample, (None, 0))
    x = draws(jax.tree.map(jnp.asarray, TRUTH), jax.random.split(jax.random.key(0), 2000))
    options = {"n_init": 10, "tol": 1e-12, "max_iter": 2000, "reg_covar": 0, "random_state": 0}
    least = -GaussianMixture(COMPONENTS, **options).fit(x).score(x)
    # The head is that of a model of labels, of which there are none: the metric is passed to it.
    transformations = {
        "natural gradient": fvp.natural_gradient(1.0, log_probs, fvp.Gaussian()),
        "Adam": optax.adam(arguments.adam),
    }
    results = {
        name: train(tx, initial(jax.random.key(0)), x, arguments.steps, arguments.draws)
        for name, tx in transformations.items()
    }
    print(f"mean negative log-likelihood, least: {least:.6f}")
    for name, (params, losses) in results.items():
        excess = float(loss(params, x)) - least
        reached = np.flatnonzero(losses < least + 1e-3)
        first = f"within 1e-3 after {reached[0]}" if reached.size else "1e-3 not reached"
        print(f"{name:16}: {excess:.1e} above it after {arguments.steps} steps, {first}")
        assert name == "Adam" or arguments.steps < 100 or excess < 1e-6, "not at the maximum"
    draw(results, least, x, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
