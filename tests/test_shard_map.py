"""Inside shard_map: ``axis_name`` says which mesh axes the batch is split over."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, total_bytes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded_problem import (
    CLASSES,
    DEVICES,
    HEAD,
    PARAMS,
    ROWS,
    VECTOR,
    assert_unchanged,
    examples,
    needs_eight_devices,
    normal,
    plain_model,
    products,
    relative_error,
    solution,
    transform,
)

import fvp

pytestmark = needs_eight_devices
COMPILE_QUICKLY = True
BATCH = examples(padded=True)


def mesh_of(**axes):
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=DEVICES[:8])


def shard_map(function, mesh, rows, check_vma=True):
    """``function(params, v, *batch)`` on each device's rows, with replicated results."""
    in_specs = (P(), P(), rows, rows, rows)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)


@pytest.mark.parametrize(("check_vma", "chunk_size"), [(True, 3), (False, None)])
def test_operators_give_the_global_mean(check_vma, chunk_size):
    compute = functools.partial(products, plain_model, axis_name="data", chunk_size=chunk_size)
    mapped = shard_map(compute, mesh_of(data=8), P("data"), check_vma)
    assert_unchanged(mapped(PARAMS, VECTOR, *BATCH))


@pytest.mark.parametrize("check_vma", [True, False])
def test_solve_and_training_step_are_the_global_ones(check_vma):
    tx = transform(plain_model, axis_name="data")

    def compute(params, v, x, y, w):
        operator = fvp.fisher(plain_model, HEAD, params, x, weights=w, axis_name="data")
        _, gradient = operator.value_and_grad(y)
        updates, _ = tx.update(gradient, tx.init(params), params, batch=x, weights=w)
        return {
            "cg": solution(plain_model, params, v, x, y, w, axis_name="data"),
            "step": jax.tree.map(jnp.add, params, updates),
        }

    assert_unchanged(
        shard_map(compute, mesh_of(data=8), P("data"), check_vma)(PARAMS, VECTOR, *BATCH)
    )


def test_defaults_take_the_global_steps():
    """Damping, rejection and budget follow the loss of all devices."""

    def train(axis_name, params, v, x, y, w):
        tx = fvp.natural_gradient(1.0, plain_model, HEAD, axis_name=axis_name)

        def step(carry, _):
            params, state = carry
            F = fvp.fisher(plain_model, HEAD, params, x, weights=w, axis_name=axis_name)
            value, gradient = F.value_and_grad(y)
            data = {"operator": F, "batch": x, "targets": y, "weights": w}
            updates, state = tx.update(gradient, state, params, **data)
            return (jax.tree.map(jnp.add, params, updates), state), (value, state.damping)

        return jax.lax.scan(step, (params, tx.init(params)), length=4)

    arguments = (PARAMS, VECTOR, *examples(padded=False))
    (_, state), trace = expected = jax.jit(functools.partial(train, None))(*arguments)
    assert state.accepted
    assert trace[0][-1] < 0.5 * trace[0][0]
    mapped = shard_map(functools.partial(train, "data"), mesh_of(data=8), P("data"))
    chex.assert_trees_all_close(mapped(PARAMS, VECTOR, *BATCH), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("axis_name", "rows"), [(("data", "model"), P(("data", "model"))), ("data", P("data"))]
)
def test_axis_name_may_be_several_or_some_of_the_mesh_axes(axis_name, rows):
    names = ("fisher", "mc_fisher")
    compute = functools.partial(products, plain_model, names=names, axis_name=axis_name)
    assert_unchanged(shard_map(compute, mesh_of(data=4, model=2), rows)(PARAMS, VECTOR, *BATCH))


def test_without_weights_the_mean_is_over_all_devices():
    def product(axis_name, params, v, x, y, w):
        return fvp.fisher(plain_model, HEAD, params, x, axis_name=axis_name) @ v

    mapped = shard_map(functools.partial(product, "data"), mesh_of(data=8), P("data"))
    expected = jax.jit(functools.partial(product, None))(PARAMS, VECTOR, *BATCH)
    assert relative_error(mapped(PARAMS, VECTOR, *BATCH), expected) < 1e-6


def test_axis_name_may_be_that_of_a_vmap():
    split = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), BATCH)
    compute = functools.partial(products, plain_model, names=("fisher", "mc_fisher"), axis_name="i")
    mapped = jax.vmap(compute, in_axes=(None, None, 0, 0, 0), axis_name="i")
    actual = jax.jit(mapped)(PARAMS, VECTOR, *split)
    for part in (0, 7):
        assert_unchanged(jax.tree.map(lambda leaf, part=part: leaf[part], actual))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_one_all_reduce_of_the_parameters_per_product(chunk_size):
    """Also for parameters that a scan over time reuses, and for a batch in chunks."""
    params = {"x": normal(0, 3, 20), "h": normal(1, 20, 20), "out": normal(2, 20, CLASSES)}

    def rnn(params, x):
        cell = lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"]), None)
        start = jnp.zeros_like(x[:, 0] @ params["x"])
        return jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))[0] @ params["out"]

    def product(params, v, x):
        return fvp.fisher(rnn, HEAD, params, x, axis_name="data", chunk_size=chunk_size) @ v

    specs = {"mesh": mesh_of(data=8), "in_specs": (P(), P(), P("data")), "out_specs": P()}
    mapped = jax.jit(jax.shard_map(product, **specs))
    found = collectives(mapped.lower(params, params, normal(3, ROWS, 5, 3)).compile())
    assert total_bytes(found, "all-reduce") == sum(leaf.nbytes for leaf in params.values())
    assert all(c.kind == "all-reduce" and not c.in_loop for c in found)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_forgetting_axis_name_is_an_error(chunk_size, weighted):
    """JAX would sum the product over devices, and nothing would sum the weights."""

    def product(params, v, x, y, w):
        weights = w if weighted else None
        return fvp.fisher(plain_model, HEAD, params, x, weights=weights, chunk_size=chunk_size) @ v

    with pytest.raises(ValueError, match="axis_name"):
        shard_map(product, mesh_of(data=8), P("data"))(PARAMS, VECTOR, *BATCH)


def test_sharded_parameters_are_an_error():
    def product(params, x):
        return fvp.fisher(plain_model, HEAD, params, x, axis_name="data") @ params

    specs = {"mesh": mesh_of(data=8), "in_specs": (P("data"), P("data")), "out_specs": P()}
    with pytest.raises(ValueError, match=r"params: .* replicated"):
        jax.jit(jax.shard_map(product, **specs))(PARAMS, BATCH[0])
