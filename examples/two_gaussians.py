"""Parameter space and distribution space: a normal distribution fitted to another one.

    python examples/two_gaussians.py

A gradient depends on the coordinates it is taken in, the natural gradient F^-1 g does not. Draws
the paths of both, in steps of one KL divergence, in the coordinates (mean, log scale); the same in
(mean, scale) and (mean, precision), where natural gradients go the same way and gradients don't;
and the densities that both pass through.

Reference: S. Amari, Natural gradient works efficiently in learning, 1998.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.scipy.stats import norm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD = fvp.LearnedScaleGaussian()
TARGET = np.array([1.0, -0.5])  # mean and log scale, the outputs z of every model below
STARTS = np.array([[-1.5, -1.2], [-1.5, 0.8], [3.0, 0.6], [2.4, -1.4]])

# From the coordinates to (mean, log scale), and back.
COORDINATES = {
    "log scale": (lambda c: c, lambda z: z),
    "scale": (lambda c: c.at[1].set(jnp.log(c[1])), lambda z: z.at[1].set(jnp.exp(z[1]))),
    "precision": (
        lambda c: c.at[1].set(-jnp.log(c[1]) / 2),
        lambda z: z.at[1].set(jnp.exp(-2 * z[1])),
    ),
}
# The Fisher's diagonal in each, of the scale s; it has nothing off the diagonal.
FISHER = {
    "log scale": lambda s: np.array([1 / s**2, 2]),
    "scale": lambda s: np.array([1 / s**2, 2 / s**2]),
    "precision": lambda s: np.array([1 / s**2, s**4 / 2]),
}


def directions(to_z, point):
    """The divergence of the target to the model, and there the gradient, F^-1 gradient and F."""
    model = lambda c, batch=None: to_z(c)[None]  # one example, of no inputs
    divergence = lambda c: HEAD.kl(jnp.array([TARGET]), model(c))[0]
    value, gradient = jax.value_and_grad(divergence)(point)
    F = fvp.fisher(model, HEAD, point, None)
    return value, {"gradient": gradient, "natural gradient": fvp.cg(F, gradient)[0]}, F


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def path(coordinates, kind, start, count, radius=None, rate=1.0):
    """(mean, log scale) along ``count`` steps, and the divergence before each.

    A step moves the distribution by at most ``radius``, 1/2 d^T F d; None is a step of ``rate``.
    """
    to_z, from_z = COORDINATES[coordinates]

    def step(point, _):
        value, ways, F = directions(to_z, point)
        way = rate * ways[kind]
        if radius is not None:
            way *= jnp.minimum(1, jnp.sqrt(2 * radius / F.quadratic_form(way)))
        return point - way, (to_z(point), value)

    return jax.lax.scan(step, from_z(jnp.asarray(start)), length=count)[1]


def closed_form(z):
    """The divergence from the target to N(mean, scale^2), as textbooks have it."""
    (m, a), (mean, log_scale) = TARGET, (z[..., 0], z[..., 1])
    square = (jnp.exp(2 * a) + (m - mean) ** 2) * jnp.exp(-2 * log_scale)
    return log_scale - a + square / 2 - 1 / 2


def check(z):
    """Fisher, divergence and direction at (mean, log scale) against what they have to be."""
    natural = {}
    for name, (to_z, from_z) in COORDINATES.items():
        value, ways, F = directions(to_z, from_z(z))
        np.testing.assert_allclose(value, closed_form(z), rtol=1e-12)
        np.testing.assert_allclose(F.dense(), np.diag(FISHER[name](np.exp(z[1]))), rtol=1e-12)
        # A direction in other coordinates, as one of (mean, log scale): J d.
        natural[name] = jax.jvp(to_z, (from_z(z),), (ways["natural gradient"],))[1]
        np.testing.assert_allclose(natural[name], natural["log scale"], rtol=1e-9)


def steps_to(kind, start, rates, radius=None, least=1e-6, count=2000):
    """The fewest steps to a divergence of ``least`` among learning rates, and that rate."""
    run = lambda rate: path("log scale", kind, start, count, radius, rate)[1] < least
    reached = np.asarray(jax.vmap(run)(jnp.asarray(rates)))
    steps = np.where(reached.any(1), reached.argmax(1), count)
    return steps.min(), rates[steps.argmin()]


def draw(arguments, output):
    figure, axes = plt.subplot_mosaic(
        [["all", "one", "gradient"], ["all", "one", "natural gradient"]],
        figsize=(14, 5),
        layout="constrained",
    )
    axis = {"mean": np.linspace(-2.2, 3.8, 201), "log": np.linspace(-1.9, 1.6, 201)}
    grid = jnp.stack(jnp.meshgrid(axis["mean"], axis["log"]), axis=-1)
    for name in ("all", "one"):
        levels = np.geomspace(0.01, 100, 13)
        axes[name].contour(*axis.values(), closed_form(grid), levels, colors="0.8", linewidths=0.8)
        axes[name].plot(*TARGET, "k*", markersize=12, zorder=5, label="target")
        axes[name].set(xlabel="mean", ylabel="log scale")
    colors = {"gradient": "C1", "natural gradient": "C0"}
    length, radius = arguments.steps, arguments.radius
    x = np.linspace(-5, 5, 400)
    for kind, color in colors.items():
        for number, start in enumerate(STARTS):
            points = path("log scale", kind, start, length, radius)[0]
            label = kind if number == 0 else None
            axes["all"].plot(*points.T, ".-", color=color, markersize=4, lw=1.2, label=label)
        for name, style in zip(COORDINATES, ("-", "--", ":"), strict=True):
            points = path(name, kind, STARTS[1], 400, radius / 100)[0]
            label = f"{kind} in (mean, {name})"
            width = 1.6 if name == "log scale" else 2.6
            axes["one"].plot(*points.T, style, color=color, lw=width, label=label)
        points = path("log scale", kind, STARTS[1], length, radius)[0]
        panel = axes[kind]
        for step, shade in zip((0, 2, 5, 10, 20), np.linspace(0.25, 1, 5), strict=True):
            mean, log_scale = points[step]
            density = norm.pdf(x, mean, jnp.exp(log_scale))
            panel.plot(x, density, color=color, alpha=shade, label=f"step {step}")
        panel.plot(x, norm.pdf(x, TARGET[0], jnp.exp(TARGET[1])), "k:", lw=1.8, label="target")
        panel.set(title=f"densities along the {kind}", yticks=[], xlabel="x", ylabel="density")
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    axes["all"].set_title(f"steps of {radius:g} nats from four starts\nover contours of the KL")
    axes["one"].set_title("three coordinates, one start:\nnatural gradients agree")
    axes["all"].legend(fontsize=8, loc="upper right")
    axes["one"].legend(fontsize=8, loc="lower left", framealpha=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="drawn of each path, 21 or more")
    parser.add_argument("--radius", type=float, default=0.05, help="of a step, in nats")
    parser.add_argument("--output", type=Path, default=Path("out/two_gaussians.png"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    for z in STARTS:
        check(jnp.asarray(z))
    print("Fisher, divergence and direction are those of the closed forms in all coordinates")

    print(f"{'start':>14}  {'gradient':>24}  {'natural gradient':>16}   steps to 1e-6 nats")
    for start in STARTS:
        plain, rate = steps_to("gradient", start, np.geomspace(1e-3, 1, 19))
        natural, _ = steps_to("natural gradient", start, np.ones(1), count=100, radius=0.5)
        assert natural < min(plain, 100), (natural, plain)
        print(f"({start[0]:5.1f}, {start[1]:5.1f})  {plain:8d} (rate {rate:.4f})  {natural:16d}")

    # How far the paths in other coordinates stray from that in (mean, log scale).
    for kind, agree in (("gradient", False), ("natural gradient", True)):
        ends = [path(name, kind, STARTS[1], 400, arguments.radius / 100)[0] for name in COORDINATES]
        apart = max(float(jnp.abs(end - ends[0]).max()) for end in ends)
        print(f"{kind}: paths in three coordinates are at most {apart:.3f} apart")
        assert (apart < 0.05) == agree, (kind, apart)
    draw(arguments, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
