"""A tour of curvature matrices: Hessian, Fisher, its estimates and its factors, beside each other.

    python examples/curvature_tour.py

For a network of 131 parameters on handwritten digits, halfway through its training. Draws each
matrix entry by entry, layer by layer, and the eigenvalues of all. Holds each against the same one
from Jacobians of single examples and `jax.hessian`, and sampling errors against their theory.
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
from matplotlib.colors import SymLogNorm

HEAD, WIDTHS = fvp.Softmax(), (5, 6, 5, 10)


def forward(params, x, shifts=None):
    """The logits, and the inputs of each layer; ``shifts`` are added to the layers' outputs."""
    inputs = []
    for number, layer in enumerate(params):
        inputs.append(x)
        x = x @ layer["w"] + layer["b"] + (0 if shifts is None else shifts[number])
        x = jnp.tanh(x) if number + 1 < len(params) else x
    return x, inputs


def model(params, x):
    return forward(params, x)[0]


def trained(params, x, y, steps):
    tx = optax.adam(0.02)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: HEAD.nll(model(p, x), y).mean())(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


def references(params, x, y):
    """The matrices by their definitions, and the variance of a sampled Fisher."""
    flat, unravel = ravel_pytree(params)
    log_p = lambda flat, x: jax.nn.log_softmax(model(unravel(flat), x))
    loss = lambda flat: -jnp.take_along_axis(log_p(flat, x), y[:, None], 1).mean()
    scores = jax.vmap(jax.jacrev(log_p), (None, 0))(flat, x)  # of each label: (N, C, P)
    p = jnp.exp(log_p(flat, x))
    fisher = jnp.einsum("nc,ncp,ncq->pq", p, scores, scores) / len(x)
    of_labels = scores[jnp.arange(len(x)), y]
    # Of one sample of every label: E |s s^T|^2 - |E s s^T|^2 over examples, in the Frobenius norm.
    each = jnp.einsum("nc,ncp,ncq->npq", p, scores, scores)
    variance = (p * (scores**2).sum(-1) ** 2).sum() - (each**2).sum()
    matrices = {
        "Hessian": jax.hessian(loss)(flat),
        "Fisher": fisher,
        "empirical Fisher": of_labels.T @ of_labels / len(x),
        "K-FAC": kronecker(params, x),
        "diagonal": jnp.diag(jnp.diagonal(fisher)),
    }
    return matrices, variance / len(x) ** 2


def kronecker(params, x):
    """E[x x^T] kron E[d d^T] of each layer on the diagonal; the bias is a first input of one."""
    logits, inputs = forward(params, x)
    root = lambda z: jnp.linalg.cholesky(jax.vmap(jnp.diag)(z) - z[:, :, None] * z[:, None, :])
    # The softmax's Fisher is singular: without its last row and column it has a root.
    root = jnp.pad(root(jax.nn.softmax(logits)[:, :-1]), ((0, 0), (0, 1), (0, 0)))
    root = root.at[:, -1].set(-root.sum(1))  # rows of the Fisher sum to zero
    shifts = [jnp.zeros(width) for width in WIDTHS[1:]]
    jacobians = jax.vmap(lambda x: jax.jacrev(lambda s: forward(params, x, s)[0])(shifts))(x)
    blocks = []
    for values, jacobian in zip(inputs, jacobians, strict=True):
        values = jnp.insert(values, 0, 1.0, axis=1)
        d = jnp.einsum("nco,nck->nko", jacobian, root).reshape(-1, jacobian.shape[-1])
        blocks.append(jnp.kron(values.T @ values, d.T @ d) / len(x) ** 2)
    return jax.scipy.linalg.block_diag(*blocks)


def check(matrices, expected, K, params):
    """Each matrix against its reference, and a product of the factors against their matrix."""
    for name, reference in expected.items():
        error = np.abs(matrices[name] - reference).max() / np.abs(reference).max()
        print(f"{name:16} differs from its definition by {error:.0e} of its largest entry")
        assert error < 1e-10, (name, error)
    flat, unravel = ravel_pytree(params)
    v = jax.random.normal(jax.random.key(2), flat.shape)
    product = ravel_pytree(K @ unravel(v))[0]
    np.testing.assert_allclose(product, matrices["K-FAC"] @ v, rtol=1e-10, atol=1e-12)


def sampling_errors(params, x, fisher, variance, repeats):
    """The root mean square distance of sampled Fishers, and its z-score, by number of samples."""
    for samples in (1, 10, 100):
        drawn = lambda key, n=samples: fvp.mc_fisher(
            model, HEAD, params, x, key, num_samples=n
        ).dense()
        square = jax.jit(lambda key, drawn=drawn: ((drawn(key) - fisher) ** 2).sum())
        keys = jax.random.split(jax.random.key(samples), repeats)
        squares = np.array([square(key) for key in tqdm(keys, f"{samples} samples")])
        error = squares.std(ddof=1) / np.sqrt(repeats)
        z = (squares.mean() - variance / samples) / error
        distance = np.sqrt(squares.mean()) / np.linalg.norm(fisher)
        print(f"Fisher from {samples:3d} samples: {distance:.1%} away, z-score {z:+.1f}")
        assert abs(z) < 4, (samples, z)


def draw(matrices, params, path):
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.8), layout="constrained")
    largest = np.abs(matrices["Fisher"]).max()
    norm = SymLogNorm(linthresh=largest / 100, vmin=-largest, vmax=largest)
    sizes = [ravel_pytree(layer)[0].size for layer in params]
    edges = np.cumsum([0, *sizes])
    middles = (edges[1:] + edges[:-1]) / 2
    names = [f"layer {number}" for number in range(1, len(sizes) + 1)]
    for panel, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
        panel.imshow(matrix, cmap="RdBu_r", norm=norm, aspect="auto")
        for edge in edges[1:-1] - 0.5:
            panel.axhline(edge, color="0.3", linewidth=0.7)
            panel.axvline(edge, color="0.3", linewidth=0.7)
        panel.set(title=name)
        panel.set_xticks(middles, names)
        panel.set_yticks(middles, names, rotation=90, va="center")
        panel.tick_params(length=0)
    ticks = [sign * largest * 10.0**-power for power in (0, 1, 2) for sign in (-1, 1)]
    bar = figure.colorbar(
        axes[0, 0].images[0], ax=axes, shrink=0.6, aspect=40, pad=0.01, ticks=[*ticks, 0]
    )
    bar.ax.set_yticklabels([f"{tick / largest:g}" for tick in [*ticks, 0]])
    bar.set_label("entry over the largest of the Fisher")
    spectra = axes.flat[-1]
    for name, matrix in matrices.items():
        values = np.linalg.eigvalsh(matrix)[::-1]
        style = {"color": "0.7", "linewidth": 5} if name == "Fisher" else {}
        (line,) = spectra.semilogy(np.where(values > 0, values, np.nan), label=name, **style)
        if values[-1] < -1e-12:
            below = np.flatnonzero(values < 0)
            spectra.semilogy(
                below, -values[below], ":", color=line.get_color(), label="Hessian, negative"
            )
    spectra.set(title="eigenvalues", xlabel="number, from the largest", ylim=(1e-8, 10))
    spectra.legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps before")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("out/curvature_tour.png"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(PCA(WIDTHS[0], whiten=True).fit_transform(images))[: arguments.examples]
    y = jnp.asarray(labels[: arguments.examples])
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    params = [
        {"w": jax.random.normal(key, (i, o)) / np.sqrt(i), "b": jnp.zeros(o)}
        for key, i, o in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]
    params = trained(params, x, y, arguments.steps)
    print(f"training loss {HEAD.nll(model(params, x), y).mean():.3f}")

    K = fvp.kfac(model, HEAD, params, x)
    diagonal = ravel_pytree(fvp.fisher_diagonal(model, HEAD, params, x))[0]
    sampled = lambda n: fvp.mc_fisher(
        model, HEAD, params, x, jax.random.key(1), num_samples=n
    ).dense()
    matrices = {
        "Hessian": fvp.hessian(model, HEAD, params, x, y).dense(),
        "Fisher": fvp.fisher(model, HEAD, params, x).dense(),
        "empirical Fisher": fvp.empirical_fisher(model, HEAD, params, x, y).dense(),
        "Fisher, 1 sample": sampled(1),
        "Fisher, 100 samples": sampled(100),
        "K-FAC": K.dense(),
        "diagonal": jnp.diag(diagonal),
    }
    expected, variance = references(params, x, y)
    check(matrices, expected, K, params)
    # The logits are the natural parameter, so the Gauss-Newton matrix is the Fisher.
    ggn = fvp.ggn(model, HEAD, params, x, y).dense()
    np.testing.assert_allclose(ggn, matrices["Fisher"], atol=1e-12)
    sampling_errors(params, x, expected["Fisher"], variance, repeats=50)
    for name, matrix in matrices.items():
        apart = np.linalg.norm(matrix - matrices["Fisher"]) / np.linalg.norm(matrices["Fisher"])
        print(f"{name:19} is {apart:4.0%} away from the Fisher")
    draw(matrices, params, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
