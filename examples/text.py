"""A character transformer, trained in mini-batches by fvp with nothing set, beside Adam.

    python examples/text.py

The text is the manual of the language that Python's standard library carries. Prints the bits per
character on pages held out, and some text from the trained model; draws the loss on those pages
against steps and against seconds.
"""

import argparse
import math
import pydoc_data.topics
import time
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

HEAD = fvp.Softmax()
CONTEXT, WIDTH, HEADS, LAYERS = 48, 48, 4, 2
EVALUATIONS = 20  # of a run, off the clock


def pages():
    """Training text and held-out text as arrays of numbers, and the characters they stand for."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    characters = sorted(set("".join(texts)))
    number = {character: n for n, character in enumerate(characters)}
    encode = lambda texts: np.array([number[c] for c in "\n".join(texts)], np.int32)
    return encode([t for n, t in enumerate(texts) if n % 8]), encode(texts[::8]), characters


def windows(text, starts):
    """Pieces of the text, and the characters that come next at each of their places."""
    pieces = text[starts[:, None] + np.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def initial(key, characters):
    normal = lambda key, i, o: jax.random.normal(key, (i, o)) / math.sqrt(i)
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    layer = lambda: {
        "qkv": normal(next(keys), WIDTH, 3 * WIDTH),
        "join": normal(next(keys), WIDTH, WIDTH),
        "up": normal(next(keys), WIDTH, 4 * WIDTH),
        "down": normal(next(keys), 4 * WIDTH, WIDTH),
        "scales": jnp.ones((2, WIDTH)),
    }
    return {
        "characters": 0.1 * jax.random.normal(next(keys), (characters, WIDTH)),
        "places": 0.1 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
        "layers": [layer() for _ in range(LAYERS)],
        "out": 0.1 * normal(next(keys), WIDTH, characters),
    }


def normalised(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def model(params, x):
    """Logits (B, T, characters) of the character after each of x (B, T)."""
    batch, length = x.shape
    h = params["characters"][x] + params["places"][:length]
    for layer in params["layers"]:
        qkv = normalised(h) * layer["scales"][0] @ layer["qkv"]
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, HEADS, WIDTH // HEADS), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h += attended.reshape(h.shape) @ layer["join"]
        h += jax.nn.gelu(normalised(h) * layer["scales"][1] @ layer["up"]) @ layer["down"]
    return normalised(h) @ params["out"]


def loss(params, x, y):
    return HEAD.nll(model(params, x), y).mean()


def train(name, tx, params, batches, held_out):
    """Trained parameters, the last state, and steps, seconds and the loss on pages held out."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, x, y):
        gradient = jax.grad(loss)(params, x, y)
        # Adam reads neither of the keywords.
        updates, state = tx.update(gradient, state, params, batch=x, targets=y)
        return optax.apply_updates(params, updates), state

    evaluate, state = jax.jit(loss), tx.init(params)
    start = time.perf_counter()
    compiled = step.lower(params, state, *batches[0]).compile()
    compilation = time.perf_counter() - start
    seconds, curve = 0.0, [(0, 0.0, float(evaluate(params, *held_out)))]
    for number, batch in enumerate(progress := tqdm(batches, name), 1):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, *batch))
        seconds += time.perf_counter() - start
        if number % max(len(batches) // EVALUATIONS, 1) == 0 or number == len(batches):
            curve.append((number, seconds, float(evaluate(params, *held_out))))
            progress.set_postfix(loss=f"{curve[-1][2]:.2f}")
    bits = curve[-1][2] / math.log(2)
    print(
        f"{name}: {bits:.3f} bits per character on held-out text, {len(batches)} steps in"
        f" {seconds:.1f} s after {compilation:.1f} s of compilation"
    )
    return params, state, np.array(curve)


def generate(params, start, count, key):
    """``start``, CONTEXT characters, and ``count`` more, each drawn from the model."""

    def step(window, key):
        drawn = HEAD.sample(key, model(params, window[None])[:, -1])[0]
        return jnp.append(window[1:], drawn.astype(window.dtype)), drawn

    keys = jax.random.split(key, count)
    return np.append(start, jax.jit(lambda s: jax.lax.scan(step, s, keys)[1])(jnp.asarray(start)))


def cross_entropy(logits, y):
    """In float64, from the definition."""
    logits = np.asarray(logits, np.float64)
    log_normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (log_normaliser - np.take_along_axis(logits, y[..., None], -1)[..., 0]).mean()


def bits_by_frequency(text, held_out, characters):
    """Per character of ``held_out``, by the frequencies of single characters in ``text``."""
    counts = np.bincount(text, minlength=characters) + 1
    return -np.log2(counts / counts.sum())[held_out].mean()


def draw(curves, by_frequency, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for name, curve in curves.items():
        steps, seconds, nats = curve.T
        left.plot(steps, nats / math.log(2), ".-", label=name)
        right.plot(seconds, nats / math.log(2), ".-", label=name)
    for axes in (left, right):
        axes.axhline(by_frequency, color="0.5", linestyle=":", label="frequencies of characters")
        axes.grid(alpha=0.3)
    left.set(xlabel="steps", ylabel="bits per character, held-out text")
    right.set(xlabel="seconds, without compilation")
    left.legend(frameon=False)
    figure.suptitle("A character transformer on Python's manual")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32, help="windows of text")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--output", type=Path, default=Path("out/text.png"), help="picture")
    arguments = parser.parse_args()

    text, held_out_text, characters = pages()
    rng = np.random.default_rng(arguments.seed)
    starts = rng.integers(len(text) - CONTEXT, size=(arguments.steps, arguments.batch_size))
    batches = [windows(text, some) for some in starts]
    held_out = windows(held_out_text, np.arange(0, len(held_out_text) - CONTEXT, CONTEXT)[:256])
    params = initial(jax.random.key(arguments.seed), len(characters))

    transformations = {
        "fvp, nothing set": optax.chain(fvp.natural_gradient(1.0, model, HEAD)),
        "Adam, 1e-3": optax.adam(1e-3),
    }
    by_frequency = bits_by_frequency(text, held_out[1], len(characters))
    print(f"frequencies of characters: {by_frequency:.3f} bits per character")
    curves = {}
    for name, tx in transformations.items():
        trained, state, curve = train(name, tx, params, batches, held_out)
        assert curve[-1, 2] < curve[0, 2], (name, curve)
        reference = cross_entropy(model(trained, held_out[0]), held_out[1])
        assert abs(curve[-1, 2] / reference - 1) < 1e-5, (curve[-1, 2], reference)
        curves[name] = curve
        if name.startswith("fvp"):
            print(fvp.describe(state))
            assert int(fvp.diagnostics(state)["step"]) == arguments.steps
            sample = generate(trained, held_out[0][0], 300, jax.random.key(1))
            print("".join(characters[n] for n in sample))
    draw(curves, by_frequency, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
