"""What may be a model function and a batch, and for how long compiled programs are kept."""

import functools
import gc
import itertools
import weakref

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import relative_error

import fvp

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()
RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 3))), "b": jnp.asarray(RNG.normal(size=3))}
X, Y = jnp.asarray(RNG.normal(size=(6, 2))), jnp.asarray(RNG.integers(0, 3, 6))
SCALE = jnp.asarray(1.7)


def plain(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) * SCALE


def scaled(scale, params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) * scale


class Module(equinox.Module):
    scale: jax.Array
    activation: object
    width: int = 3

    def __call__(self, params, x):
        assert x.ndim == 2
        return self.activation(x @ params["w"] + params["b"]) * self.scale


class Owner:
    """Its method is a new object at every access."""

    def model_fn(self, params, x):
        return plain(params, x)


def with_flags(params, batch):
    assert batch["mode"] == "scaled"
    assert batch["names"] == ["a", None, "b"]
    z = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return z * batch["scale"] if batch["train"] else z


FLAGS = {"x": X, "train": True, "mode": "scaled", "names": ["a", None, "b"], "scale": 1.7}
OWNER = Owner()
FORMS = {
    "partial": (jax.tree_util.Partial(scaled, SCALE), X, 0),
    "functools.partial": (functools.partial(scaled, SCALE), X, 0),
    "module": (Module(SCALE, jnp.tanh), X, 0),
    "module of a jitted function": (Module(SCALE, jax.jit(jnp.tanh)), X, 0),
    "method": (OWNER.model_fn, X, 0),
    "flags": (with_flags, FLAGS, {**dict.fromkeys(FLAGS), "x": 0}),
}


def transform_update(make):
    def update(model_fn, batch, axes):
        tx = make(model_fn, axes)
        gradient = jax.grad(lambda p: HEAD.nll(plain(p, X), Y).mean())(PARAMS)
        return tx.update(gradient, tx.init(PARAMS), PARAMS, batch=batch, targets=Y)[0]

    return update


def scale_by_fisher(**options):
    return transform_update(
        lambda model_fn, axes: fvp.scale_by_fisher(model_fn, HEAD, batch_axes=axes, **options)
    )


WEIGHTS = jnp.asarray([1.0, 0.0, 2.0, 1.0, 1.0, 0.5])
CALLS = {
    "fisher": lambda f, b, axes: fvp.fisher(f, HEAD, PARAMS, b) @ PARAMS,
    "weighted": lambda f, b, axes: fvp.fisher(f, HEAD, PARAMS, b, weights=WEIGHTS) @ PARAMS,
    "chunked": lambda f, b, axes: (
        fvp.fisher(f, HEAD, PARAMS, b, chunk_size=4, batch_axes=axes) @ PARAMS
    ),
    "hessian": lambda f, b, axes: fvp.hessian(f, HEAD, PARAMS, b, Y) @ PARAMS,
    "one call": lambda f, b, axes: fvp.fisher_vector_product(f, HEAD, PARAMS, b, PARAMS),
    "one chunked call": lambda f, b, axes: fvp.ggn_vector_product(
        f, HEAD, PARAMS, b, Y, PARAMS, chunk_size=4, batch_axes=axes
    ),
    "jitted": lambda f, b, axes: (
        jax.jit(lambda p: fvp.fisher(f, HEAD, p, b, chunk_size=4, batch_axes=axes))(PARAMS) @ PARAMS
    ),
    "dual": lambda f, b, axes: fvp.solve_dual(fvp.fisher(f, HEAD, PARAMS, b), PARAMS, 0.1),
    "transform": scale_by_fisher(),
    "chunked transform": scale_by_fisher(chunk_size=4, damping=0.1),
    "bent transform": scale_by_fisher(
        solver="dense", damping=0.1, geodesic=True, line_search="loss"
    ),
}


@functools.cache
def expected(call):
    return CALLS[call](plain, X, 0)


# Every form through products, whole and in chunks; every call with two forms, in turn.
MEETINGS = list(itertools.product(("fisher", "chunked"), FORMS)) + [
    (call, list(FORMS)[(2 * number + other) % len(FORMS)])
    for number, call in enumerate(CALLS)
    for other in (0, 3)
    if call not in ("fisher", "chunked")
]


@pytest.mark.parametrize(("call", "form"), MEETINGS)
def test_models_and_batches_of_every_form(form, call):
    assert relative_error(CALLS[call](*FORMS[form]), expected(call)) < 1e-12


def test_arrays_of_a_model_are_data():
    """Modules that differ in arrays alone share a program, and are not confused."""
    traces = []

    def counted(scale, params, x):
        traces.append(None)
        return scaled(scale, params, x)

    counts = []
    for scale in (1.0, 2.0, 3.0):
        model_fn = jax.tree_util.Partial(counted, jnp.asarray(scale))
        product = fvp.fisher(model_fn, HEAD, PARAMS, X) @ PARAMS
        fresh = fvp.fisher(functools.partial(scaled, scale), HEAD, PARAMS, X) @ PARAMS
        assert relative_error(product, fresh) < 1e-12
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]


def test_a_flag_that_changes_is_another_program():
    def model_fn(params, batch):
        z = batch["x"] @ params["w"] + params["b"]
        return jnp.tanh(z) if batch["bounded"] else z

    for bounded in (True, False, True):
        batch = {"x": X, "bounded": bounded}
        product = fvp.fisher_vector_product(model_fn, HEAD, PARAMS, batch, PARAMS)
        fixed = lambda params, x, bounded=bounded: model_fn(params, {"x": x, "bounded": bounded})
        assert relative_error(product, fvp.fisher(fixed, HEAD, PARAMS, X) @ PARAMS) < 1e-12


# Lifetimes ---------------------------------------------------------------------------------------


def use_eagerly(model_fn):
    F = fvp.fisher(model_fn, HEAD, PARAMS, X)
    F @ PARAMS
    F.quadratic_form(PARAMS)
    F.value_and_grad(Y)
    chunked = fvp.fisher(model_fn, HEAD, PARAMS, X, chunk_size=4)
    chunked @ PARAMS
    fvp.fisher_vector_product(model_fn, HEAD, PARAMS, X, PARAMS)
    fvp.cg(F, PARAMS, damping=0.1)


def test_programs_die_with_the_function_that_they_were_made_for():
    def use_and_forget(make):
        model_fn = make()
        use_eagerly(model_fn)
        return weakref.ref(getattr(model_fn, "__self__", model_fn))

    for make in (
        lambda: lambda params, x: plain(params, x),
        lambda: functools.partial(scaled, 2.0),
        lambda: Owner().model_fn,
    ):
        dead = use_and_forget(make)
        gc.collect()
        assert dead() is None


def live_programs():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def test_fresh_functions_in_a_loop_keep_no_programs():
    for _ in range(2):
        use_eagerly(lambda params, x: plain(params, x))
    before = live_programs()
    for _ in range(3):
        use_eagerly(lambda params, x: plain(params, x))
    assert live_programs() <= before


def test_programs_of_a_living_function_are_kept():
    traces = []

    def model_fn(params, x):
        traces.append(None)
        return plain(params, x)

    use_eagerly(model_fn)
    count = len(traces)
    gc.collect()
    use_eagerly(model_fn)
    assert len(traces) == count


def test_methods_of_one_object_share_programs():
    class Counting:
        def __init__(self):
            self.traces = 0

        def model_fn(self, params, x):
            self.traces += 1
            return plain(params, x)

    one, other = Counting(), Counting()
    for _ in range(2):
        for owner in (one, other):
            fvp.fisher_vector_product(owner.model_fn, HEAD, PARAMS, X, PARAMS)
    assert one.traces == other.traces == 1
