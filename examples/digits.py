"""Natural gradient beside Adam: a Flax NNX classifier of scikit-learn's handwritten digits.

    python examples/digits.py
    python examples/digits.py --model mlp --batch-size 256

Prints the accuracy of both and draws their training loss against steps and against seconds.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HEAD = fvp.Softmax()
ADAM_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # each is tried; the best after --steps steps goes on
ADAM_STEPS = 10  # for each step of the natural gradient, which costs 10 to 20 gradients


def build_model(name: str, rngs: nnx.Rngs) -> nnx.Module:
    if name == "mlp":
        return nnx.Sequential(
            nnx.Linear(64, 128, rngs=rngs), nnx.tanh, nnx.Linear(128, 10, rngs=rngs)
        )
    return nnx.Sequential(
        lambda x: x.reshape(-1, 8, 8, 1),
        nnx.Conv(1, 16, (3, 3), conv_general_dilated=convolution, rngs=rngs),
        nnx.gelu,
        lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2)).reshape(-1, 256),
        nnx.Linear(256, 10, rngs=rngs),
    )


def convolution(x: Array, kernel: Array, *_, **__) -> Array:
    """3 x 3, stride 1, same size: one matrix product with the nine shifted copies of x.

    On CPU, XLA compiles the transpose of a convolution badly inside a loop (jax issue 12868), and
    conjugate gradients are a loop: this is 15 times faster there. On GPU, leave it out.
    """
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def batches(images: Array, labels: Array, size: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Shuffled batches for ever; size 0 is the whole set each time."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size or len(order)):
            rows = order[start : start + size]
            yield (images[rows], labels[rows]) if size else (images, labels)


def natural_gradient(model_fn, learning_rate, damping):
    """The optimizer, and one step of training with it."""
    tx = fvp.natural_gradient(learning_rate, model_fn, HEAD, damping=damping)

    def step(params, state, images, labels):
        # Gradient and curvature share one linearisation of the model.
        fisher = fvp.fisher(model_fn, HEAD, params, images)
        _, gradient = fisher.value_and_grad(labels)
        updates, state = tx.update(gradient, state, params, operator=fisher)
        return optax.apply_updates(params, updates), state

    return tx, step


def adam(loss, learning_rate):
    """The same for Adam. Its state holds the learning rate, so that all rates compile once."""
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)

    def step(params, state, images, labels):
        updates, state = tx.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def compile_step(step, *args):
    """The compiled step and the seconds that it took."""
    start = time.perf_counter()
    compiled = jax.jit(step).lower(*args).compile()
    return compiled, time.perf_counter() - start


def train(name, tx, step, params, data, loss, seconds):
    """Trained parameters, and the curve: seconds (counted from the given ones), loss."""
    state, curve = tx.init(params), []
    for batch in (progress := tqdm(data, name, leave=False)):
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, *batch))
        seconds += time.perf_counter() - start  # the evaluation of the loss is off the clock
        curve.append((seconds, float(loss(params))))
        progress.set_postfix(loss=f"{curve[-1][1]:.1e}", refresh=False)
    return params, np.array(curve)


def draw(runs, steps, title, path):
    """Loss against steps and against seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name, (_, curve, _) in runs.items():
        seconds, loss = curve.T
        left.plot(np.arange(1, len(loss) + 1), loss, label=name)
        right.plot(seconds, loss, label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log", xlim=(0, steps))
    right.set(xlabel="seconds, compilation included", xlim=(0, None))
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "cnn"), default="cnn")
    parser.add_argument("--batch-size", type=int, default=0, help="0 is the full batch")
    parser.add_argument("--learning-rate", type=float, default=1.0, help="of the natural gradient")
    parser.add_argument("--damping", type=float, default=0.1, help="at the first step")
    parser.add_argument("--steps", type=int, default=50, help="of the natural gradient")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--output", type=Path, default=Path("out/digits.png"))
    args = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    pixels = (pixels / 8 - 1).astype(np.float32)
    split = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)
    images, test_images, labels, test_labels = map(jnp.asarray, split)
    if not 0 <= args.batch_size <= len(images):
        parser.error(f"--batch-size: expected 0 to {len(images)}, got {args.batch_size}.")
    stream = batches(images, labels, args.batch_size, args.seed)
    data = list(itertools.islice(stream, ADAM_STEPS * args.steps))

    # The model as a pure function of its parameters; both optimizers start from the same.
    model = build_model(args.model, nnx.Rngs(args.seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    model_fn = lambda params, images: nnx.merge(graphdef, params, rest)(images)
    loss = jax.jit(lambda params, x, y: HEAD.nll(model_fn(params, x), y).mean())
    accuracy = jax.jit(lambda params, x, y: (model_fn(params, x).argmax(-1) == y).mean())
    train_loss = lambda params: loss(params, images, labels)
    train_loss(params)  # compiles here, and not between the steps

    # Far from the minimum the quadratic model holds for short steps only, so damping starts high
    # and falls with the loss. The noise of mini-batches does not fall, and keeps it up.
    floor = args.damping * (0.5 if args.batch_size else 1e-3)
    damping = optax.exponential_decay(args.damping, 1, decay_rate=0.85, end_value=floor)
    tx, step = natural_gradient(model_fn, args.learning_rate, damping)
    step, compiling = compile_step(step, params, tx.init(params), *data[0])
    name = "natural gradient"
    runs = {
        name: (*train(name, tx, step, params, data[: args.steps], train_loss, compiling), compiling)
    }

    best, rate = np.inf, None
    tx, step = adam(loss, ADAM_RATES[0])
    step, compiling = compile_step(step, params, tx.init(params), *data[0])
    for candidate in ADAM_RATES:
        tx, _ = adam(loss, candidate)
        _, curve = train(f"Adam {candidate}", tx, step, params, data[: args.steps], train_loss, 0.0)
        if curve[-1, 1] < best:
            best, rate = curve[-1, 1], candidate
    tx, _ = adam(loss, rate)
    name = f"Adam, tuned: {rate}"
    runs[name] = (*train(name, tx, step, params, data, train_loss, compiling), compiling)

    for name, (params, curve, compiling) in runs.items():
        seconds, last = curve[-1]
        print(
            f"{name}: {len(curve)} steps, {compiling:.1f} s to compile + {seconds - compiling:.1f} s;"
            f" training loss {last:.1e},"
            f" accuracy {accuracy(params, images, labels):.2%} train,"
            f" {accuracy(params, test_images, test_labels):.2%} test"
        )
    draw(runs, args.steps, f"scikit-learn digits, {args.model}", args.output)
    print(f"Curves: {args.output}")


if __name__ == "__main__":
    main()
