"""Sharded equals unsharded under jit on eight devices, and nothing is sent that need not be."""

import functools

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, loop_state_shapes, total_bytes
from dense import rarely, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_problem import (
    CURVATURES,
    DEVICES,
    HEAD,
    PARAMS,
    VECTOR,
    assert_unchanged,
    examples,
    loss,
    needs_eight_devices,
    plain_model,
    products,
    solution,
    training_step,
    transform,
)

import fvp

pytestmark = needs_eight_devices
COMPILE_QUICKLY = True

PARAM_BYTES = sum(leaf.nbytes for leaf in PARAMS.values())
REPLICATED = dict.fromkeys(PARAMS, P())
TENSOR_PARALLEL = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None), "b2": P()}
FULLY_SHARDED = {"w1": P("data", None), "b1": P("data"), "w2": P("data", None), "b2": P()}
LAYOUTS = {  # shape of the (data, model) mesh, and where the parameters are
    "DP": ((8, 1), REPLICATED),
    "FSDP": ((8, 1), FULLY_SHARDED),
    "TP": ((1, 8), TENSOR_PARALLEL),
    "DPxTP": ((4, 2), TENSOR_PARALLEL),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
some_layouts = pytest.mark.parametrize(  # what is sent is looked at for every one of them, below
    ("layout", "axis_type"),
    [("DP", AUTO), ("FSDP", EXPLICIT), ("TP", AUTO), ("DPxTP", EXPLICIT), ("DPxTP", AUTO)],
)
sharded_layouts = pytest.mark.parametrize("layout", ["FSDP", "TP", "DPxTP"])


def explicit_model(layout, params, x):
    """``plain_model`` with the shardings that an Explicit mesh asks its user to state."""
    if layout == "FSDP":
        params = {name: jax.sharding.reshard(leaf, P()) for name, leaf in params.items()}
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.dot(hidden, params["w2"], out_sharding=P("data", None)) + params["b2"]


class Placed:
    """A mesh, and the problem placed on it."""

    def __init__(self, layout, axis_type):
        shape, self.specs = LAYOUTS[layout]
        self.mesh = jax.make_mesh(
            shape, ("data", "model"), axis_types=(axis_type,) * 2, devices=DEVICES[:8]
        )
        explicit = axis_type == AxisType.Explicit
        self.model_fn = functools.partial(explicit_model, layout) if explicit else plain_model
        self.shardings = {k: NamedSharding(self.mesh, spec) for k, spec in self.specs.items()}
        self.params, self.vector = jax.device_put((PARAMS, VECTOR), (self.shardings,) * 2)
        rows = NamedSharding(self.mesh, P("data"))
        self.batch = tuple(jax.device_put(leaf, rows) for leaf in examples(padded=True))

    def compile(self, function, *args):
        with jax.set_mesh(self.mesh):
            return jax.jit(functools.partial(function, self.model_fn)).lower(*args).compile()

    def products(self, **options):
        arguments = self.params, self.vector, *self.batch
        return self.compile(functools.partial(products, **options), *arguments)(*arguments)

    @functools.cached_property
    def solve(self):
        return self.compile(solution, self.params, self.vector, *self.batch)

    def holds(self, shardings):
        """Whether a tree like the parameters is sharded as they are."""
        return all(
            shardings[name].is_equivalent_to(expected, PARAMS[name].ndim)
            for name, expected in self.shardings.items()
        )


placed = functools.cache(Placed)


def shardings(tree):
    return {name: leaf.sharding for name, leaf in tree.items()}


@some_layouts
def test_operators_equal_unsharded(layout, axis_type):
    # One layout has them all; the others leave out what is made of the same parts.
    names = CURVATURES if layout == "DPxTP" else ("fisher", "empirical_fisher")
    assert_unchanged(placed(layout, axis_type).products(names=names))


@some_layouts
def test_operators_in_chunks_equal_unsharded(layout, axis_type):
    names = ("fisher", "mc_fisher") if layout == "DPxTP" else ("fisher",)
    assert_unchanged(placed(layout, axis_type).products(names=names, chunk_size=24))


@every_layout
@every_axis_type
def test_solve_equals_unsharded(layout, axis_type):
    at = placed(layout, axis_type)
    assert_unchanged({"cg": at.solve(at.params, at.vector, *at.batch)})


@some_layouts
def test_training_step_equals_unsharded_and_keeps_the_shardings(layout, axis_type):
    at, traces = placed(layout, axis_type), []
    tx = transform(at.model_fn)

    @jax.jit
    def step(*arguments):
        traces.append(None)
        return training_step(at.model_fn, tx, *arguments)

    with jax.set_mesh(at.mesh):
        params, state = at.params, tx.init(at.params)
        assert at.holds(shardings(state.direction))
        types = jax.tree.map(jax.typeof, state)
        for count in range(2):
            params, state = step(params, state, *at.batch)
            assert at.holds(shardings(params))
            assert at.holds(shardings(state.direction))
            assert jax.tree.map(jax.typeof, state) == types
            if count == 0:
                assert_unchanged({"step": params})
    assert len(traces) == 1


@functools.cache
def unsharded_steps_under_noise():
    """Parameters after two steps where noise leads, on one device."""
    return steps_under_noise(plain_model, PARAMS, examples(padded=False))[0]


def steps_under_noise(model_fn, params, batch):
    # In float64: the direction divides by what may be rounding.
    wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    params, batch = jax.tree.map(wide, (params, batch))
    tx = fvp.natural_gradient(1.0, model_fn, HEAD)
    state = tx.init(params)
    noise = state.noise._replace(leads=jnp.ones_like(state.noise.leads))
    claims = noise.claims._replace(claimed=jnp.ones_like(noise.claims.claimed))
    state = state._replace(noise=noise._replace(claims=claims))
    types = jax.tree.map(jax.typeof, state)
    step = jax.jit(functools.partial(training_step, model_fn, tx))
    for _ in range(2):
        params, state = step(params, state, *batch)
        assert jax.tree.map(jax.typeof, state) == types
    return params, state


@pytest.mark.parametrize(("layout", "axis_type"), [("FSDP", EXPLICIT), rarely("DPxTP", AUTO)])
def test_steps_under_noise_equal_unsharded_and_keep_the_shardings(layout, axis_type):
    at = placed(layout, axis_type)
    with jax.set_mesh(at.mesh):
        params, state = steps_under_noise(at.model_fn, at.params, at.batch)
        assert at.holds(shardings(params))
        assert at.holds(shardings(state.noise.moments.second_moment))
    expected = unsharded_steps_under_noise()
    assert max(relative_error(params[name], expected[name]) for name in params) < 1e-8


@every_axis_type
def test_data_parallel_products_send_the_size_of_the_parameters_once(axis_type):
    found = collectives(placed("DP", axis_type).solve)
    assert {c.kind for c in found} == {"all-reduce"}
    assert PARAM_BYTES <= total_bytes(found, "all-reduce", in_loop=True) <= 1.02 * PARAM_BYTES


@every_axis_type
@sharded_layouts
def test_parameters_are_gathered_only_where_the_gradient_gathers_them(layout, axis_type):
    at = placed(layout, axis_type)
    gradient = lambda model_fn, *args: jax.grad(functools.partial(loss, model_fn))(*args)
    gradient = collectives(at.compile(gradient, at.params, *at.batch))
    solve = collectives(at.solve)
    gathered = lambda found: {s for c in found if c.kind == "all-gather" for s in c.shapes}
    assert gathered(solve) <= gathered(gradient)
    assert bool(gathered(gradient)) == (layout == "FSDP")
    # In the loop, the vector takes the place of the parameters.
    once = total_bytes(gradient, "all-gather")
    assert total_bytes(solve, "all-gather", in_loop=True) <= once


@every_axis_type
@sharded_layouts
def test_conjugate_gradient_vectors_are_sharded_as_the_parameters(layout, axis_type):
    at = placed(layout, axis_type)
    loops = loop_state_shapes(at.solve)
    # The first layer's weights are no residual of the model, so that only vectors have its shape.
    local_shape = at.shardings["w1"].shard_shape(PARAMS["w1"].shape)
    # Solution, residual, direction.
    assert max(carried.count(local_shape) for carried in loops) == 3
    assert all(PARAMS["w1"].shape not in carried for carried in loops)
    assert at.holds(at.solve.output_shardings)
