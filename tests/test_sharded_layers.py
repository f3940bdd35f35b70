"""Layer curvature on eight devices equals that on one; inversions are shared out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import rarely, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_problem import (
    DEVICES,
    HEAD,
    PARAMS,
    VECTOR,
    examples,
    loss,
    needs_eight_devices,
    plain_model,
)

import fvp
from fvp.mesh import balanced_owners

COMPILE_QUICKLY = True
pytestmark = needs_eight_devices

LAYOUTS = {
    "DP": dict.fromkeys(PARAMS, P()),
    "FSDP": {"w1": P("data", None), "b1": P("data"), "w2": P("data", None), "b2": P()},
    "TP": {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None), "b2": P()},
}


def make_mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2, devices=DEVICES)


def curvatures(params, v, x, y, w, mesh=None):
    del y
    K = fvp.kfac(plain_model, HEAD, params, x, weights=w)
    return {
        "product": K @ v,
        "pi": K.inverse(0.1, rule="pi", mesh=mesh).mv(v),
        "exact": K.inverse(0.1, mesh=mesh).mv(v),
        "diagonal": fvp.fisher_diagonal(plain_model, HEAD, params, x, weights=w),
    }


def train(tx, params, x, y, w):
    """The second of two steps, which inverts nothing."""

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(functools.partial(loss, plain_model))(params, x, y, w)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y, weights=w)
        return (jax.tree.map(jnp.subtract, params, updates), state), (updates, state.accepted)

    _, steps = jax.lax.scan(step, (params, tx.init(params)), length=2)
    return jax.tree.map(lambda leaf: leaf[1], steps)


def placed(mesh, layout):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS[layout].items()}
    params, vector = jax.device_put((PARAMS, VECTOR), (shardings,) * 2)
    rows = [jax.device_put(leaf, NamedSharding(mesh, P("data"))) for leaf in data()]
    return params, vector, *rows


def data():
    x, y, w = examples(padded=True)
    return x, jnp.maximum(y, 0), w


@functools.cache
def unsharded():
    return jax.jit(curvatures)(PARAMS, VECTOR, *data())


@pytest.mark.parametrize(
    ("layout", "axis_type"),
    [
        rarely("DP", AxisType.Auto),
        rarely("TP", AxisType.Auto),
        ("FSDP", AxisType.Explicit),
        rarely("TP", AxisType.Explicit),
    ],
)
def test_sharded_curvature_equals_unsharded(layout, axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        arguments = placed(mesh, layout)
        found = jax.jit(functools.partial(curvatures, mesh=mesh))(*arguments)
    for name, value in found.items():
        assert relative_error(jax.device_get(value), unsharded()[name]) < 2e-5, name
        if axis_type == AxisType.Explicit:
            for leaf, spec in LAYOUTS[layout].items():
                assert value[leaf].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_fields_of_a_head_pass_an_explicit_mesh():
    def trace(scale, params, x):
        head = fvp.Gaussian(scale=scale)
        return fvp.kfac(plain_model, head, params, x).trace()

    x = data()[0]
    with jax.set_mesh(mesh := make_mesh(AxisType.Explicit)):
        params, _, sharded, *_ = placed(mesh, "DP")
        found = [jax.jit(trace)(0.5, params, sharded), trace(0.5, params, sharded)]
    np.testing.assert_allclose(found, trace(0.5, PARAMS, x), rtol=1e-5)


OPTIONS = {
    "num_samples": None,
    "inverse_period": 2,
    "example_batch": jax.ShapeDtypeStruct(data()[0].shape, jnp.float32),
}


@functools.cache
def unsharded_step():
    tx = fvp.scale_by_kfac(plain_model, HEAD, **OPTIONS)
    updates, accepted = jax.jit(functools.partial(train, tx))(PARAMS, *data())
    assert accepted
    return updates


@pytest.mark.parametrize("layout", ["FSDP", *map(rarely, ("DP", "TP"))])
def test_sharded_step_equals_unsharded(layout):
    mesh = make_mesh(AxisType.Auto)
    tx = fvp.scale_by_kfac(plain_model, HEAD, mesh=mesh, **OPTIONS)
    with jax.set_mesh(mesh):
        params, _, *batch = placed(mesh, layout)
        found, _ = jax.jit(functools.partial(train, tx))(params, *batch)
    assert relative_error(jax.device_get(found), unsharded_step()) < 2e-5


def solve(params, v, x, y, w):
    F = fvp.fisher(plain_model, HEAD, params, x, weights=w)
    _, gradient = F.value_and_grad(y)
    return fvp.solve_dual(F, v, 0.1), fvp.solve_dual(F, gradient, 0.1, targets=y)


@functools.cache
def unsharded_solve():
    return jax.jit(solve)(PARAMS, VECTOR, *data())


@pytest.mark.parametrize("layout", ["TP", *map(rarely, ("DP", "FSDP"))])
def test_sharded_dual_solve_equals_unsharded(layout):
    with jax.set_mesh(mesh := make_mesh(AxisType.Auto)):
        found = jax.jit(solve)(*placed(mesh, layout))
    assert relative_error(jax.device_get(found), unsharded_solve()) < 1e-5


def test_dual_solve_of_explicitly_sharded_examples_says_what_to_do():
    with jax.set_mesh(mesh := make_mesh(AxisType.Explicit)):
        arguments = placed(mesh, "DP")
        with pytest.raises(ValueError, match=r"auto_axes"):
            jax.jit(solve)(*arguments)
        found = jax.jit(jax.sharding.auto_axes(solve, out_sharding=P()))(*arguments)
    assert relative_error(jax.device_get(found), unsharded_solve()) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_each_block_is_inverted_by_one_device(shared):
    """With a mesh no factorisation is part of the program that all devices run."""
    mesh = make_mesh(AxisType.Auto)
    K = fvp.kfac(plain_model, HEAD, PARAMS, data()[0])
    invert = lambda K: K.inverse(0.1, rule="pi", mesh=mesh if shared else None)
    replicated = jax.device_put(K, NamedSharding(mesh, P()))
    text = jax.jit(invert).lower(replicated).compile().as_text()
    everywhere = text[text.index("\nENTRY ") :]
    assert "potrf" in text
    assert ("potrf" in everywhere) is not shared


def test_owners_are_balanced():
    assert balanced_owners([1, 1, 1, 1], 4) == [0, 1, 2, 3]
    costs = [3, 5, 3, 4, 3]
    owners = balanced_owners(costs, 2)
    np.testing.assert_array_equal(np.bincount(owners, costs), [8, 10])
