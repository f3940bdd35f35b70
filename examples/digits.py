"""Natural gradient beside Adam: a Flax NNX classifier of scikit-learn's handwritten digits.

    python examples/digits.py
    python examples/digits.py --model cnn --batch-size 256

Prints the accuracy of both and draws their training loss against steps and against seconds.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of 0.01, 0.02, 0.03, 0.05, 0.1 and 0.2, those with the lowest training loss after 50 steps, mean
# of 5 seeds, both on the full batch and on batches of 256.
ADAM_LEARNING_RATE = {"mlp": 0.05, "cnn": 0.1}
ADAM_STEPS = 20  # for each step of the natural gradient, which costs 15 to 20 gradients here


def build_model(name, rngs):
    if name == "mlp":
        return nnx.Sequential(
            nnx.Linear(64, 128, rngs=rngs), nnx.tanh, nnx.Linear(128, 10, rngs=rngs)
        )
    return nnx.Sequential(
        lambda x: x.reshape(-1, 8, 8, 1),
        nnx.Conv(1, 16, (3, 3), rngs=rngs),
        nnx.gelu,
        lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2)).reshape(-1, 256),
        nnx.Linear(256, 10, rngs=rngs),
    )


def batches(images, labels, size, seed):
    """Shuffled batches for ever; size 0 is the full batch."""
    while not size:
        yield images, labels
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield images[rows], labels[rows]


def train(name, optimizer, step, params, data, loss):
    """Trained parameters, and the curve: seconds since compilation began, and loss."""
    state = optimizer.init(params)
    start = time.perf_counter()
    step = jax.jit(step).lower(params, state, *data[0]).compile()
    seconds = time.perf_counter() - start
    curve = [(seconds, float(loss(params)))]
    for batch in (progress := tqdm(data, name)):
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, *batch))
        seconds += time.perf_counter() - start  # the evaluation of the loss is off the clock
        curve.append((seconds, float(loss(params))))
        progress.set_postfix(loss=f"{curve[-1][1]:.1e}", refresh=False)
    return params, np.array(curve)


def draw(curves, steps, title, path):
    """Training loss against steps and against seconds; dotted while the step compiles."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for color, (name, curve) in zip(("C0", "C1"), curves.items(), strict=True):
        seconds, loss = curve.T
        left.plot(loss[: steps + 1], color, label=f"{name} ({seconds[0]:.1f} s to compile)")
        right.plot(seconds, loss, color)
        right.plot([0, seconds[0]], [loss[0], loss[0]], color, linestyle=":")
    left.set(xlabel="steps", ylabel="training loss", yscale="log")
    right.set(xlabel="seconds, compilation included")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--batch-size", type=int, default=0, help="0 is the full batch")
    parser.add_argument("--learning-rate", type=float, default=1.0, help="of the natural gradient")
    parser.add_argument("--damping", type=float, help="a constant one; adaptive if not given")
    parser.add_argument("--steps", type=int, default=50, help="of the natural gradient")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--output", type=Path, default=Path("out/digits.png"), help="picture")
    args = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    pixels = np.asarray(pixels / 8 - 1, np.float32)
    split = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)
    images, test_images, labels, test_labels = map(jnp.asarray, split)
    if not 0 <= args.batch_size <= len(images):
        parser.error(f"--batch-size: expected 0 to {len(images)}, got {args.batch_size}")
    stream = batches(images, labels, args.batch_size, args.seed)
    data = list(islice(stream, ADAM_STEPS * args.steps))

    # The model as a pure function of its parameters, from which both optimizers start.
    graphdef, params, rest = nnx.split(build_model(args.model, nnx.Rngs(args.seed)), nnx.Param, ...)
    model_fn = lambda params, images: nnx.merge(graphdef, params, rest)(images)
    head = fvp.Softmax()
    loss = jax.jit(lambda params, x, y: head.nll(model_fn(params, x), y).mean())
    train_loss = lambda params: loss(params, images, labels)
    accuracy = jax.jit(lambda params, x, y: (model_fn(params, x).argmax(-1) == y).mean())

    damping = fvp.LevenbergMarquardt() if args.damping is None else args.damping
    natural_gradient = fvp.natural_gradient(args.learning_rate, model_fn, head, damping=damping)
    adam_learning_rate = ADAM_LEARNING_RATE[args.model]
    adam = optax.adam(adam_learning_rate)

    def natural_gradient_step(params, state, images, labels):
        # Gradient and curvature share one linearisation of the model; batch and targets are there
        # to try the step on the loss.
        fisher = fvp.fisher(model_fn, head, params, images)
        _, gradient = fisher.value_and_grad(labels)
        updates, state = natural_gradient.update(
            gradient, state, params, operator=fisher, batch=images, targets=labels
        )
        return optax.apply_updates(params, updates), state

    def adam_step(params, state, images, labels):
        gradient = jax.grad(loss)(params, images, labels)
        updates, state = adam.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    curves = {}
    for name, optimizer, step, steps in (
        ("natural gradient", natural_gradient, natural_gradient_step, args.steps),
        (f"Adam, tuned to {adam_learning_rate}", adam, adam_step, ADAM_STEPS * args.steps),
    ):
        trained, curve = train(name, optimizer, step, params, data[:steps], train_loss)
        print(
            f"{name}: {steps} steps in {curve[-1, 0]:.1f} s ({curve[0, 0]:.1f} s to compile),"
            f" training loss {curve[-1, 1]:.1e},"
            f" accuracy {accuracy(trained, images, labels):.1%} train,"
            f" {accuracy(trained, test_images, test_labels):.1%} test"
        )
        curves[name] = curve
    batch = f"batches of {args.batch_size}" if args.batch_size else "full batch"
    draw(curves, args.steps, f"Handwritten digits: {args.model}, {batch}", args.output)


if __name__ == "__main__":
    main()
