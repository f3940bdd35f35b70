"""Save and restore a training run with orbax: the resumed run equals an unbroken one exactly.

    python examples/checkpoint.py

Trains on scikit-learn's digits for 20 steps without a break; then for 10 steps, saves parameters
and optimizer state, restores them as a new process would, and trains the other 10.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import fvp


def model_fn(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


tx = fvp.natural_gradient(1.0, model_fn, fvp.Softmax())


def init_params():
    hidden, out = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(hidden, (64, 128)) / 8,
        "out": jax.random.normal(out, (128, 10)) / 11,
    }


def train(run, steps, batch, targets):
    """``run`` is the dictionary of parameters and optimizer state."""

    @jax.jit
    def step(run):
        operator = fvp.fisher(model_fn, fvp.Softmax(), run["params"], batch)
        _, gradient = operator.value_and_grad(targets)
        updates, state = tx.update(
            gradient,
            run["state"],
            run["params"],
            operator=operator,
            batch=batch,
            targets=targets,
        )
        return {"params": optax.apply_updates(run["params"], updates), "state": state}

    for _ in range(steps):
        run = step(run)
    loss = fvp.Softmax().nll(model_fn(run["params"], batch), targets).mean()
    print(f"after {optax.tree.get(run, 'count')} steps: loss {loss:.3e}")
    return run


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--directory", type=Path, help="of the checkpoint, or a temporary one")
    args = parser.parse_args()

    pixels, labels = load_digits(return_X_y=True)
    data = jnp.asarray(pixels / 8 - 1, jnp.float32), jnp.asarray(labels)
    params = init_params()
    start = {"params": params, "state": tx.init(params)}
    unbroken = train(start, args.steps, *data)

    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.directory or Path(temporary)).resolve() / "half"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, train(start, args.steps // 2, *data), force=True)
        with ocp.StandardCheckpointer() as checkpointer:
            # Shapes and dtypes alone say what to restore; no training is repeated for them.
            half = checkpointer.restore(directory, jax.eval_shape(lambda: start))
    resumed = train(half, args.steps - args.steps // 2, *data)

    pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(unbroken), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise SystemExit("the resumed run differs from the unbroken one")
    print("the resumed run equals the unbroken one to the last bit")


if __name__ == "__main__":
    main()
