"""Ten training steps that run unchanged in one process and in several.

As a script: ``multiprocess_worker.py PROCESS COUNT PORT``; prints the losses as JSON. Every process
holds its own part of the examples.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fvp

STEPS, ROWS, FEATURES, HIDDEN, CLASSES = 10, 48, 6, 8, 4
HEAD = fvp.Softmax()


def model_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def loss(params, x, y, w):
    return jnp.sum(w * HEAD.nll(model_fn(params, x), y)) / jnp.sum(w)


def data():
    """Examples of a noisy linear rule, with unequal weights; some are zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    scores = x @ rng.normal(size=(FEATURES, CLASSES)) + rng.normal(size=(ROWS, CLASSES))
    w = rng.uniform(0.2, 2.0, ROWS) * (np.arange(ROWS) < ROWS - 5)
    return x, scores.argmax(-1).astype(np.int32), w.astype(np.float32)


def parameters():
    rng = np.random.default_rng(1)
    shapes = {"w1": (FEATURES, HIDDEN), "w2": (HIDDEN, CLASSES)}
    return {k: (0.5 * rng.normal(size=shape)).astype(np.float32) for k, shape in shapes.items()}


def train(mesh, specs):
    """Losses before each of the steps."""
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    mine = slice(
        jax.process_index() * ROWS // jax.process_count(),
        (jax.process_index() + 1) * ROWS // jax.process_count(),
    )
    batch = [jax.make_array_from_process_local_data(rows, leaf[mine]) for leaf in data()]
    place = lambda value, spec: jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, spec), lambda index: value[index]
    )
    initial = parameters()
    params = {name: place(initial[name], spec) for name, spec in specs.items()}
    tx = fvp.natural_gradient(0.5, model_fn, HEAD, damping=0.1, warm_start=True)
    state = tx.init(params)

    @functools.partial(jax.jit, out_shardings=(None, None, replicated))
    def step(params, state, x, y, w):
        value, gradient = jax.value_and_grad(loss)(params, x, y, w)
        updates, state = tx.update(gradient, state, params, batch=x, weights=w)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    return losses


def losses(devices):
    """Of each layout of the parameters over a mesh of all ``devices``."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    layouts = {
        "replicated": {"w1": P(), "w2": P()},
        "sharded": {"w1": P(None, "data"), "w2": P("data")},
    }
    with jax.set_mesh(mesh):
        return {name: train(mesh, specs) for name, specs in layouts.items()}


if __name__ == "__main__":
    process, count, port = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # it is compiled and hardly run
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=120)
    print(json.dumps(losses(jax.devices())))
    jax.distributed.shutdown()
