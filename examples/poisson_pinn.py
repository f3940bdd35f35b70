"""A physics-informed network for Poisson's equation, by exact natural-gradient steps.

    python examples/poisson_pinn.py
    python examples/poisson_pinn.py --seconds 30 --seed 1

-u_xx - u_yy = f on the unit square, u = 0 on its edge, with solution sin(pi x) sin(pi y). There are
9,873 parameters and 1,020 residuals: each step is solved exactly in the space of residuals. Prints
the absolute L2 error and draws it against time, beside the solution and where it is wrong.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTHS = (2, 64, 64, 48, 48, 1)
INTERIOR, EDGE, EVALUATION = 900, 120, 9000


def solution(x):
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(jnp.pi * x[..., 1])


def init(rng):
    layers = []
    for inputs, outputs in pairwise(WIDTHS):
        bound = inputs**-0.5
        draw = lambda *shape, bound=bound: jnp.asarray(rng.uniform(-bound, bound, shape))
        layers.append({"w": draw(inputs, outputs), "b": draw(outputs)})
    return layers


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[..., 0]


def residuals(params, batch):
    """The equation's inside, the value on the edge: the mean of each kind counts once."""
    u = lambda x: network(params, x)

    def equation(x):
        second = lambda e: jax.jvp(lambda x: jax.jvp(u, (x,), (e,))[1], (x,), (e,))[1]
        return jax.vmap(second)(jnp.eye(2)).sum() + 2 * jnp.pi**2 * solution(x)

    kinds = {"inside": jax.vmap(equation)(batch["inside"]), "edge": u(batch["edge"])}
    return fvp.stack_residuals(kinds)


def points(rng):
    edge, side = rng.uniform(size=(EDGE, 2)), np.arange(EDGE) % 4
    edge[np.arange(EDGE), side // 2] = side % 2
    return {"inside": jnp.asarray(rng.uniform(size=(INTERIOR, 2))), "edge": jnp.asarray(edge)}


def train(params, batch, evaluation, seconds):
    head, targets = fvp.Gaussian(event_ndim=0), jnp.zeros(INTERIOR + EDGE)
    # Exact steps, bent and halved until the loss falls: the library chooses solver and damping.
    tx = fvp.natural_gradient(
        1.0, residuals, head, solver="auto", line_search="loss", geodesic=True
    )

    @jax.jit
    def step(params, state):
        operator = fvp.fisher(residuals, head, params, batch)
        loss = jnp.mean(operator.output**2) / 2
        _, gradient = operator.value_and_grad(targets)
        data = {"batch": batch, "targets": targets, "operator": operator}
        updates, state = tx.update(gradient, state, params, **data)
        damping = fvp.diagnostics(state)["damping"]
        return optax.apply_updates(params, updates), state, {"loss": loss, "damping": damping}

    error = jax.jit(
        lambda p: jnp.sqrt(jnp.mean((network(p, evaluation) - solution(evaluation)) ** 2))
    )
    start = time.perf_counter()
    state = tx.init(params)
    compiled = step.lower(params, state).compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    curve = []
    with tqdm(unit="step") as progress:
        while not curve or time.perf_counter() - start < seconds:
            params, state, found = compiled(params, state)
            curve.append((float(error(params)), time.perf_counter() - start))
            found = {"error": curve[-1][0], **found}
            progress.set_postfix({name: f"{float(x):.1e}" for name, x in found.items()})
            progress.update()
    return params, np.array(curve)


def draw(params, curve, path):
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 101)] * 2, indexing="ij"), axis=-1)
    u = network(params, grid)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    axes[0].semilogy(curve[:, 1], curve[:, 0])
    axes[0].axhline(1e-6, color="gray", linestyle=":")
    axes[0].set(xlabel="seconds, compilation included", ylabel="absolute L2 error")
    axes[0].grid(alpha=0.3)
    for axis, values, title in zip(axes[1:], (u, u - solution(grid)), ("u", "error"), strict=True):
        image = axis.imshow(values.T, origin="lower", extent=(0, 1, 0, 1))
        axis.set(title=title, xlabel="x", ylabel="y")
        figure.colorbar(image, ax=axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the points")
    parser.add_argument("--output", type=Path, default=Path("out/poisson.png"), help="picture")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    rng = np.random.default_rng(args.seed)
    params = init(rng)
    batch = points(rng)
    evaluation = jnp.asarray(rng.uniform(size=(EVALUATION, 2)))
    params, curve = train(params, batch, evaluation, args.seconds)
    below = np.flatnonzero(curve[:, 0] <= 1e-6)
    reached = f"1e-6 after {curve[below[0], 1]:.1f} s" if below.size else "1e-6 not reached"
    print(f"{len(curve)} steps: absolute L2 error {curve[-1, 0]:.2e}; {reached}")
    draw(params, curve, args.output)


if __name__ == "__main__":
    main()
