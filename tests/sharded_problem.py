"""The problem of the tests on eight devices, and its unsharded results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import relative_error

import fvp

DEVICES = jax.devices("cpu")
needs_eight_devices = pytest.mark.skipif(
    len(DEVICES) < 8, reason="needs jax_num_cpu_devices = 8 before JAX starts"
)

HEAD, KEY = fvp.Softmax(), jax.random.key(3)
ROWS, PADDING = 64, 5
FEATURES, HIDDEN, CLASSES = 24, 40, 16  # so that every array is recognised by its shape
CURVATURES = ("fisher", "ggn", "empirical_fisher", "mc_fisher", "hessian")
CG = {"damping": 0.1, "tol": 0, "maxiter": 5}
BOUND = 1e-6


# --- One problem, unsharded -------------------------------------------------------------------


def plain_model(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters(seed, scale):
    return {
        "w1": scale * normal(seed, FEATURES, HIDDEN),
        "b1": scale * normal(seed + 1, HIDDEN),
        "w2": scale * normal(seed + 2, HIDDEN, CLASSES),
        "b2": scale * normal(seed + 3, CLASSES),
    }


PARAMS, VECTOR = parameters(0, 0.2), parameters(10, 1.0)
PARAM_BYTES = sum(leaf.nbytes for leaf in PARAMS.values())


def examples(padded):
    """x, targets and non-uniform weights; a padded batch ends in rows of weight zero."""
    rng, real = np.random.default_rng(5), ROWS - PADDING
    x = normal(4, real, FEATURES)
    y = jnp.asarray(rng.integers(0, CLASSES, real), jnp.int32)
    w = jnp.asarray(rng.uniform(0.2, 2.0, real), jnp.float32)
    if not padded:
        return x, y, w
    pad = lambda a, value: jnp.concatenate([a, jnp.full((PADDING, *a.shape[1:]), value, a.dtype)])
    return pad(x, 0), pad(y, -100), pad(w, 0)


def loss(model_fn, params, x, y, w):
    nll = jnp.where(w == 0, 0, w * HEAD.nll(model_fn(params, x), jnp.maximum(y, 0)))
    return jnp.sum(nll) / jnp.sum(w)


def transform(model_fn, **options):
    options = {"warm_start": True, **CG, **options}
    return fvp.natural_gradient(0.5, model_fn, HEAD, **options)


def products(model_fn, params, v, x, y, w, names=CURVATURES, **options):
    """What the operators give."""
    arguments = {
        "fisher": (),
        "ggn": (y,),
        "empirical_fisher": (y,),
        "mc_fisher": (KEY,),
        "hessian": (y,),
    }
    found = {}
    for name in names:
        build = getattr(fvp, name)
        operator = build(model_fn, HEAD, params, x, *arguments[name], weights=w, **options)
        found[name] = operator @ v
        if name == "fisher":
            found["quadratic_form"] = operator.quadratic_form(v)
            found["loss"], found["gradient"] = operator.value_and_grad(y)
    return found


def solution(model_fn, params, rhs, x, y, w, **options):
    """The solve of the damped Fisher, in a fixed number of iterations."""
    del y
    return fvp.cg(fvp.fisher(model_fn, HEAD, params, x, weights=w, **options), rhs, **CG)[0]


def training_step(model_fn, tx, params, state, x, y, w):
    gradient = jax.grad(functools.partial(loss, model_fn))(params, x, y, w)
    updates, state = tx.update(gradient, state, params, batch=x, weights=w)
    return optax.apply_updates(params, updates), state


@functools.cache
def unsharded():
    """Everything on one device, for the batch without its padding."""
    tx = transform(plain_model)

    @jax.jit
    def compute(params, v, *batch):
        return {
            **products(plain_model, params, v, *batch),
            "cg": solution(plain_model, params, v, *batch),
            "step": training_step(plain_model, tx, params, tx.init(params), *batch)[0],
        }

    return compute(PARAMS, VECTOR, *examples(padded=False))


def assert_unchanged(actual):
    """Every entry equals the unsharded one; relative to the largest value."""
    for name, value in jax.device_get(actual).items():
        assert relative_error(value, unsharded()[name]) < 1e-6, name
