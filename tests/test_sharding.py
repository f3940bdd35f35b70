"""Sharded equals unsharded on eight devices, and nothing is sent that need not be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import collectives, loop_state_shapes, total_bytes
from dense import relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fvp

DEVICES = jax.devices("cpu")
pytestmark = pytest.mark.skipif(len(DEVICES) < 8, reason="needs jax_num_cpu_devices = 8")

HEAD, KEY = fvp.Softmax(), jax.random.key(3)
ROWS, PADDING = 64, 5
FEATURES, HIDDEN, CLASSES = 24, 40, 16  # so that every array is recognised by its shape
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


def results(model_fn, params, v, x, y, w, *, chunk_size=None, **options):
    """Everything that sharding must not change."""
    chunks = {"weights": w, "chunk_size": chunk_size, **options}
    operators = {
        "fisher": fvp.fisher(model_fn, HEAD, params, x, **chunks),
        "ggn": fvp.ggn(model_fn, HEAD, params, x, y, **chunks),
        "empirical_fisher": fvp.empirical_fisher(model_fn, HEAD, params, x, y, **chunks),
        "mc_fisher": fvp.mc_fisher(model_fn, HEAD, params, x, KEY, **chunks),
        "hessian": fvp.hessian(model_fn, HEAD, params, x, y, **chunks),
    }
    found = {name: operator @ v for name, operator in operators.items()}
    found["quadratic_form"] = operators["fisher"].quadratic_form(v)
    value, gradient = operators["fisher"].value_and_grad(y)
    found["loss"], found["gradient"] = value, gradient
    found["cg"], _ = fvp.cg(operators["fisher"], v, **CG)
    tx = transform(model_fn, chunk_size=chunk_size, **options)
    found["step"], _ = tx.update(gradient, tx.init(params), params, batch=x, weights=w)
    return found


RESULTS = (
    *("fisher", "ggn", "empirical_fisher", "mc_fisher", "hessian"),
    *("quadratic_form", "loss", "gradient", "cg", "step"),
)


@functools.cache
def unsharded():
    x, y, w = examples(padded=False)
    return jax.jit(functools.partial(results, plain_model))(PARAMS, VECTOR, x, y, w)


# --- Under jit --------------------------------------------------------------------------------

REPLICATED = dict.fromkeys(PARAMS, P())
TENSOR_PARALLEL = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None), "b2": P()}
FULLY_SHARDED = {"w1": P("data", None), "b1": P("data"), "w2": P("data", None), "b2": P()}
LAYOUTS = {  # shape of the (data, model) mesh, and where the parameters are
    "DP": ((8, 1), REPLICATED),
    "FSDP": ((8, 1), FULLY_SHARDED),
    "TP": ((1, 8), TENSOR_PARALLEL),
    "DPxTP": ((4, 2), TENSOR_PARALLEL),
}


def explicit_model(layout, params, x):
    """``plain_model`` with the shardings that an Explicit mesh asks its user to state."""
    if layout == "FSDP":
        params = {name: jax.sharding.reshard(leaf, P()) for name, leaf in params.items()}
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.dot(hidden, params["w2"], out_sharding=P("data", None)) + params["b2"]


class Layout:
    """A mesh, and the problem placed on it."""

    def __init__(self, layout, axis_type):
        shape, self.specs = LAYOUTS[layout]
        self.mesh = make_mesh(shape, ("data", "model"), axis_type)
        explicit = axis_type == AxisType.Explicit
        self.model_fn = functools.partial(explicit_model, layout) if explicit else plain_model
        self.params, self.vector = self.place(PARAMS), self.place(VECTOR)
        rows = NamedSharding(self.mesh, P("data"))
        self.batch = tuple(jax.device_put(leaf, rows) for leaf in examples(padded=True))

    def place(self, tree):
        shardings = {name: NamedSharding(self.mesh, spec) for name, spec in self.specs.items()}
        return jax.device_put(tree, shardings)

    def compile(self, function, *args):
        with jax.set_mesh(self.mesh):
            return jax.jit(function).lower(*args).compile()

    def local_shape(self, name):
        return NamedSharding(self.mesh, self.specs[name]).shard_shape(PARAMS[name].shape)


def make_mesh(shape, names, axis_type):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=DEVICES[:8])


@functools.cache
def layout_of(layout, axis_type):
    return Layout(layout, axis_type)


@functools.cache
def sharded(layout, axis_type, chunk_size):
    at = layout_of(layout, axis_type)
    compute = functools.partial(results, at.model_fn, chunk_size=chunk_size)
    with jax.set_mesh(at.mesh):
        return jax.device_get(jax.jit(compute)(at.params, at.vector, *at.batch))


every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)


@every_layout
@every_axis_type
@pytest.mark.parametrize("chunk_size", [None, 24])
@pytest.mark.parametrize("name", RESULTS)
def test_sharded_equals_unsharded(layout, axis_type, chunk_size, name):
    actual = sharded(layout, axis_type, chunk_size)[name]
    assert relative_error(actual, unsharded()[name]) < BOUND


def gradient_program(at):
    return at.compile(jax.grad(functools.partial(loss, at.model_fn)), at.params, *at.batch)


def solve_program(at):
    def solve(params, rhs, x, y, w):
        return fvp.cg(fvp.fisher(at.model_fn, HEAD, params, x, weights=w), rhs, **CG)[0]

    return at.compile(solve, at.params, at.vector, *at.batch)


@every_axis_type
def test_data_parallel_products_send_the_parameters_size_once(axis_type):
    found = collectives(solve_program(layout_of("DP", axis_type)))
    assert {c.kind for c in found} == {"all-reduce"}
    assert PARAM_BYTES <= total_bytes(found, "all-reduce", in_loop=True) <= 1.02 * PARAM_BYTES


@every_axis_type
@pytest.mark.parametrize("layout", ["TP", "DPxTP", "FSDP"])
def test_parameters_are_gathered_only_where_the_gradient_gathers_them(layout, axis_type):
    at = layout_of(layout, axis_type)
    gradient, solve = collectives(gradient_program(at)), collectives(solve_program(at))
    gathered = lambda found: {s for c in found if c.kind == "all-gather" for s in c.shapes}
    assert gathered(solve) <= gathered(gradient)
    # In the loop, the vector takes the place of the parameters.
    once = total_bytes(gradient, "all-gather")
    assert (once > 0) == (layout == "FSDP")
    assert total_bytes(solve, "all-gather", in_loop=True) <= once


@every_axis_type
@pytest.mark.parametrize("layout", ["TP", "DPxTP", "FSDP"])
def test_conjugate_gradient_vectors_are_sharded_as_the_parameters(layout, axis_type):
    at = layout_of(layout, axis_type)
    program = solve_program(at)
    carried = loop_state_shapes(program)
    # First layer: its weights are no residual of the linearisation, so only vectors have its shape.
    assert carried.count(at.local_shape("w1")) == 3  # solution, residual, direction
    assert PARAMS["w1"].shape not in carried
    for name, sharding in program.output_shardings.items():
        expected = NamedSharding(at.mesh, at.specs[name])
        assert sharding.is_equivalent_to(expected, PARAMS[name].ndim), name


@every_layout
@every_axis_type
def test_training_keeps_the_sharding_of_parameters_and_state(layout, axis_type):
    at = layout_of(layout, axis_type)
    tx = transform(at.model_fn)

    @jax.jit
    def step(params, state, x, y, w):
        gradient = jax.grad(functools.partial(loss, at.model_fn))(params, x, y, w)
        updates, state = tx.update(gradient, state, params, batch=x, weights=w)
        return optax.apply_updates(params, updates), state

    def placed(tree):
        return all(
            leaf.sharding.is_equivalent_to(NamedSharding(at.mesh, at.specs[name]), leaf.ndim)
            for name, leaf in tree.items()
        )

    with jax.set_mesh(at.mesh):
        params, state = at.params, tx.init(at.params)
        assert placed(state.direction)
        types = jax.tree.map(jax.typeof, state)
        for _ in range(2):
            params, state = step(params, state, *at.batch)
            assert placed(params)
            assert placed(state.direction)
            assert jax.tree.map(jax.typeof, state) == types
        expected = jax.tree.map(jnp.add, PARAMS, unsharded()["step"])
        first, _ = step(at.params, tx.init(at.params), *at.batch)
    assert relative_error(jax.device_get(first), expected) < BOUND


# --- Inside shard_map -------------------------------------------------------------------------


def in_shard_map(function, mesh, rows, check_vma=True):
    """``function(params, v, x, y, w)`` on each device's rows; replicated results."""
    in_specs = (P(), P(), rows, rows, rows)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)


@functools.cache
def shard_mapped(check_vma, chunk_size):
    mesh = make_mesh((8,), ("data",), AxisType.Auto)
    compute = functools.partial(results, plain_model, chunk_size=chunk_size, axis_name="data")
    mapped = in_shard_map(compute, mesh, P("data"), check_vma)
    return jax.device_get(mapped(PARAMS, VECTOR, *examples(padded=True)))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", RESULTS)
def test_shard_map_with_axis_name_gives_the_global_mean(check_vma, chunk_size, name):
    actual = shard_mapped(check_vma, chunk_size)[name]
    assert relative_error(actual, unsharded()[name]) < BOUND


@pytest.mark.parametrize(
    ("axis_name", "rows"), [(("data", "model"), P(("data", "model"))), ("data", P("data"))]
)
def test_axis_name_may_be_some_of_the_mesh_axes(axis_name, rows):
    mesh = make_mesh((4, 2), ("data", "model"), AxisType.Auto)

    def products(params, v, x, y, w):
        options = {"weights": w, "axis_name": axis_name}
        operators = {
            "fisher": fvp.fisher(plain_model, HEAD, params, x, **options),
            "mc_fisher": fvp.mc_fisher(plain_model, HEAD, params, x, KEY, **options),
        }
        return {name: operator @ v for name, operator in operators.items()}

    actual = in_shard_map(products, mesh, rows)(PARAMS, VECTOR, *examples(padded=True))
    for name, product in actual.items():
        assert relative_error(product, unsharded()[name]) < BOUND, name


def test_without_weights_the_mean_is_over_all_devices():
    mesh = make_mesh((8,), ("data",), AxisType.Auto)
    x, y, w = examples(padded=True)

    def product(axis_name, params, v, x, y, w):
        return fvp.fisher(plain_model, HEAD, params, x, axis_name=axis_name) @ v

    mapped = in_shard_map(functools.partial(product, "data"), mesh, P("data"))
    expected = jax.jit(functools.partial(product, None))(PARAMS, VECTOR, x, y, w)
    assert relative_error(mapped(PARAMS, VECTOR, x, y, w), expected) < BOUND


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_one_all_reduce_of_the_parameters_size_per_product_in_shard_map(chunk_size):
    """Also for parameters that a scan over time reuses, and for a batch in chunks."""
    mesh = make_mesh((8,), ("data",), AxisType.Auto)
    params = {"x": normal(0, 3, 20), "h": normal(1, 20, 20), "out": normal(2, 20, CLASSES)}

    def rnn(params, x):
        cell = lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"]), None)
        start = jnp.zeros_like(x[:, 0] @ params["x"])
        return jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))[0] @ params["out"]

    def product(params, v, x):
        return fvp.fisher(rnn, HEAD, params, x, axis_name="data", chunk_size=chunk_size) @ v

    mapped = jax.shard_map(product, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    found = collectives(jax.jit(mapped).lower(params, params, normal(3, ROWS, 5, 3)).compile())
    size = sum(leaf.nbytes for leaf in params.values())
    assert total_bytes(found, "all-reduce", in_loop=False) == size
    assert all(not c.in_loop for c in found)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_forgetting_axis_name_is_an_error(chunk_size):
    """JAX would sum the product over devices, but nothing would sum the weights."""
    mesh = make_mesh((8,), ("data",), AxisType.Auto)

    def product(params, v, x, y, w):
        return fvp.fisher(plain_model, HEAD, params, x, weights=w, chunk_size=chunk_size) @ v

    with pytest.raises(ValueError, match="axis_name"):
        in_shard_map(product, mesh, P("data"))(PARAMS, VECTOR, *examples(padded=True))


def test_sharded_parameters_inside_shard_map_are_an_error():
    mesh = make_mesh((8,), ("data",), AxisType.Auto)

    def product(params, x):
        return fvp.fisher(plain_model, HEAD, params, x, axis_name="data") @ params

    mapped = jax.shard_map(product, mesh=mesh, in_specs=(FULLY_SHARDED, P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"params: .* replicated"):
        jax.jit(mapped)(PARAMS, examples(padded=True)[0])
