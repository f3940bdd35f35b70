"""Two tasks one after the other without forgetting the first: elastic weight consolidation.

    python examples/continual_digits.py

The first task is handwritten digits, the second the same with their pixels permuted. Adam trains a
network on the first, then on the second: once as it is, once with a penalty on the squared change
of each parameter, weighted by the diagonal of the Fisher on the first task. Draws the accuracy on
held-out images of both tasks during the second.

J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.tree_util import Partial
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD, HIDDEN = fvp.Softmax(), 256
OPTIMIZER, BATCH = optax.adam(1e-3), 64
EVERY = 20  # steps from one evaluation to the next


def model(params, x):
    hidden = jax.nn.gelu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def initial(key):
    layer = lambda key, i, o: {
        "w": jax.random.normal(key, (i, o)) / np.sqrt(i),
        "b": jnp.zeros(o),
    }
    first, last = jax.random.split(key)
    return {"hidden": layer(first, 64, HIDDEN), "out": layer(last, HIDDEN, 10)}


def make_tasks(seed):
    """The digits and the digits in permuted pixels: (x, y) for training, and (x, y) held out."""
    pixels, y = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32)
    permuted = x[:, np.random.default_rng(seed).permutation(x.shape[1])]
    x, x_test, permuted, permuted_test, y, y_test = train_test_split(
        x, permuted, y, test_size=1 / 3, random_state=seed
    )
    return [(x, y), (permuted, y)], [(x_test, y_test), (permuted_test, y_test)]


def no_penalty(params):
    return 0.0


@jax.jit
def step(params, state, x, y, penalty):
    loss = lambda params: HEAD.nll(model(params, x), y).mean() + penalty(params)
    updates, state = OPTIMIZER.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(jnp.argmax(model(params, x), -1) == y)


def train(params, task, tests, penalty, steps, seed, name):
    """The parameters after ``steps``, and the accuracies (evaluations, tasks) on the way."""
    x, y = task
    evaluate = lambda params: [float(accuracy(params, *test)) for test in tests]
    rng, state, accuracies = np.random.default_rng(seed), OPTIMIZER.init(params), []
    for number in (progress := tqdm(range(steps), f"seed {seed}, {name}")):
        if number % EVERY == 0:
            accuracies.append(evaluate(params))
            progress.set_postfix_str("accuracies {:.0%}, {:.0%}".format(*accuracies[-1]))
        rows = rng.integers(len(x), size=BATCH)
        params, state = step(params, state, x[rows], y[rows], penalty)
    return params, np.array([*accuracies, evaluate(params)])


def compare(seed, strength, steps):
    """The accuracies while the second task is learned, without and with the penalty."""
    (first, second), tests = make_tasks(seed)
    nothing, params = Partial(no_penalty), initial(jax.random.key(seed))
    params, _ = train(params, first, tests, nothing, steps[0], seed, "first task")
    importance = fvp.fisher_diagonal(model, HEAD, params, first[0])
    old = {"anchor": params, "importance": importance, "strength": strength}
    penalties = {"plain": nothing, "elastic": Partial(fvp.ewc_penalty, **old)}
    return {
        name: train(params, second, tests, penalty, steps[1], seed, f"second task, {name}")[1]
        for name, penalty in penalties.items()
    }


def draw(results, steps, path):
    """Accuracy on each task against steps: the mean over seeds, and each seed faintly."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for task, (axis, title) in enumerate(zip(axes, ("first task", "second task"), strict=True)):
        for colour, (name, accuracies) in enumerate(results.items()):
            at = np.minimum(EVERY * np.arange(accuracies.shape[1]), steps)
            axis.plot(at, accuracies[..., task].T, f"C{colour}", alpha=0.25, linewidth=1)
            axis.plot(at, accuracies[..., task].mean(0), f"C{colour}", label=name)
        axis.set(xlabel="training steps on the second task", title=title, ylim=(0, 1.02))
    axes[0].set(ylabel="accuracy on held-out images")
    axes[1].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--strength", type=float, default=200.0, help="weight of the first task")
    parser.add_argument("--steps", type=int, nargs=2, default=[1000, 1500], help="on each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out/continual_digits.png"))
    arguments = parser.parse_args()

    runs = [compare(seed, arguments.strength, arguments.steps) for seed in arguments.seeds]
    results = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
    print(f"after the first task: accuracy {results['plain'][:, 0, 0].mean():.1%} on it")
    for name, accuracies in results.items():
        first, second = accuracies[:, -1].T
        print(
            f"after the second, {name}: {first.mean():.1%} on the first (worst {first.min():.1%}),"
            f" {second.mean():.1%} on the second (worst {second.min():.1%})"
        )
    draw(results, arguments.steps[1], arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
