"""chunk_size bounds memory and changes nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, CURVATURES, mlp, parameters, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

ALL_CURVATURES = (*CURVATURES, "mc_fisher")
KEY = jax.random.key(11)

every_curvature = pytest.mark.parametrize("curvature", ALL_CURVATURES)


def problem(case, batch_axes, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    params = parameters(rng, case.size)
    vector = parameters(rng, case.size)
    batch = jnp.asarray(rng.normal(size=(*batch_axes, 2)))
    weights = rng.uniform(0.2, 2.0, batch_axes)
    cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, batch, weights, vector))
    return *cast, case.targets(rng, batch_axes)


def dtypes(tree):
    return jax.tree.map(lambda a: a.dtype, tree)


def product(operator, vector, targets):
    return operator @ vector


def everything(operator, vector, targets):
    """All that an operator computes from chunks."""
    return {
        "product": operator @ vector,
        "product_and_form": operator.mv_and_form(vector),
        "inner_products": operator.inner_products(vector, jax.tree.map(jnp.tanh, vector)),
        "output": operator.output,
        "value_and_grad": operator.value_and_grad(targets),
    }


@pytest.fixture(scope="module")
def evaluate(build):
    """Results of an operator, each computed once: the whole one is compared with many."""

    @functools.cache
    def evaluate(results, curvature, name, batch_axes, chunk_size, dtype=jnp.float64):
        case = CASES[name]

        @quick_jit
        def compiled(params, batch, weights, vector, targets):
            operator = build(
                curvature, mlp(case.event_shape), case.head, params, batch, targets, KEY,
                weights=weights, chunk_size=chunk_size,
            )  # fmt: skip
            return results(operator, vector, targets)

        return compiled(*problem(case, batch_axes, dtype))

    return evaluate


# 6 = 2 x 3 splits evenly even by 4, into 3 + 3; 7 leaves a remainder for each of 2 to 6.
@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize(
    ("count", "chunk_size"),
    [(6, 3), (6, 4), (7, 1), (7, 2), (7, 3), (7, 5), (7, 6), (7, 7), (7, 100)],
)
def test_chunked_product_equals_unchunked(evaluate, curvature, count, chunk_size):
    chunked, whole = (
        evaluate(product, curvature, "softmax", (count,), size) for size in (chunk_size, None)
    )
    assert relative_error(chunked, whole) < 1e-12


@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize(
    ("name", "batch_axes", "chunk_size", "dtype", "tolerance"),
    [
        ("gaussian-precision", (5, 3), 2, jnp.float64, 1e-12),
        ("sigmoid", (7,), 4, jnp.float32, 1e-6),
    ],
    ids=["float64", "float32"],
)
def test_chunked_results_equal_unchunked(
    evaluate, curvature, name, batch_axes, chunk_size, dtype, tolerance
):
    chunked, whole = (
        evaluate(everything, curvature, name, batch_axes, size, dtype)
        for size in (chunk_size, None)
    )
    for item, value in chunked.items():
        assert relative_error(value, whole[item]) < tolerance, item
        assert dtypes(value) == dtypes(whole[item]), item


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (5, 1), (1, 1)], ids=str)
def test_broadcast_weights_in_chunks(build, shape):
    case = CASES["softmax-rows"]
    params, batch, _, vector, targets = problem(case, (5, 3))
    weights = np.random.default_rng(1).uniform(0.2, 2.0, shape)

    @quick_jit
    def products(weights):
        arguments = mlp(case.event_shape), case.head, params, batch, targets, KEY
        operators = [
            build("empirical_fisher", *arguments, weights=weights, chunk_size=size)
            for size in (3, None)
        ]
        return [operator @ vector for operator in operators]

    assert relative_error(*products(weights)) < 1e-12


@every_curvature
def test_masked_rows_leave_no_trace_in_chunks(build, curvature):
    """Whole chunks may be masked, and the padding of the last chunk is masked like any row."""
    case = CASES["softmax"]
    inner = mlp(case.event_shape)
    params, batch, _, vector, targets = problem(case, (7,))
    masked = np.array([1, 2, 4, 5])
    weights = np.ones(7)
    weights[masked] = 0
    bad = np.zeros(7, int)
    bad[masked] = 1
    offsets = jnp.asarray([0, np.nan])  # by integers: inputs that are NaN would be replaced

    def model(params, batch):
        return inner(params, batch[0]) + offsets[batch[1]][:, None]

    @quick_jit
    def product(bad, targets, chunked):
        return [
            build(
                curvature, model, case.head, params, (batch, bad), targets, KEY,
                weights=weights, chunk_size=chunk_size,
            ) @ vector
            for chunk_size in ([3, 2] if chunked is not None else [None])
        ]  # fmt: skip

    expected = product(np.zeros(7, int), targets, None)[0]
    for actual in product(bad, targets.at[masked].set(-100), True):
        assert relative_error(actual, expected) < 1e-12


@every_curvature
def test_weights_that_sum_to_zero_give_zero_in_chunks(build, curvature):
    case = CASES["softmax"]
    params, batch, weights, vector, targets = problem(case, (7,))

    @quick_jit
    def computed(weights):
        arguments = mlp(case.event_shape), case.head, params, batch, targets, KEY
        operator = build(curvature, *arguments, weights=weights, chunk_size=4)
        return operator @ vector, operator.quadratic_form(vector), operator.value_and_grad(targets)

    for leaf in jax.tree.leaves(computed(0 * weights)):
        assert np.array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize(("chunk_size", "largest"), [(2, 2), (3, 3), (5, 4)])
def test_no_chunk_is_larger_than_its_size(chunk_size, largest):
    """Beside the whole batch, whose shape alone is asked for."""
    case = CASES["softmax"]
    inner, sizes = mlp(case.event_shape), set()
    params, batch, _, vector, _ = problem(case, (7,))

    def model(params, batch):
        sizes.add(len(batch))
        return inner(params, batch)

    product = lambda p: fvp.fisher(model, case.head, p, batch, chunk_size=chunk_size) @ vector
    jax.eval_shape(product, params)
    assert sizes == {7, largest}


def test_sums_over_chunks_are_wider_than_bfloat16():
    """Each of 1000 chunks adds as much: in bfloat16 a sum would stop growing at 256 of them."""
    x, w = jnp.ones((1000, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x, chunk_size=1)
    gradient = F.value_and_grad(jnp.zeros_like(x))[1]
    for value in (F @ w, F.mv_and_form(w)[0], gradient):
        assert relative_error(value, jnp.ones((1, 1))) < 1e-2


# --- batch_axes -------------------------------------------------------------------------------


def two_input_model(params, batch):
    """x with its examples on axis 1, one scale per example, and a shift shared by all."""
    x = (batch["x"].T + batch["shared"]["shift"]) * batch["scale"][:, None]
    return mlp((3,))(params, x)


def two_input_batch():
    rng = np.random.default_rng(4)
    return {
        "x": rng.normal(size=(2, 7)),
        "scale": rng.uniform(0.5, 2.0, 7),
        "shared": {"shift": rng.normal(size=2), "unused": np.arange(5), "none": None},
    }


@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize("axis", [1, -1])
def test_batch_axes_name_the_example_axis_of_each_leaf(build, curvature, axis):
    case = CASES["softmax"]
    params, _, weights, vector, targets = problem(case, (7,))
    batch_axes = {"x": axis, "scale": 0, "shared": None}

    @quick_jit
    def products(params, batch):
        arguments = case.head, params, batch, targets, KEY
        chunked = build(
            curvature, two_input_model, *arguments,
            weights=weights, chunk_size=4, batch_axes=batch_axes,
        )  # fmt: skip
        whole = build(curvature, two_input_model, *arguments, weights=weights)
        return chunked @ vector, whole @ vector, chunked.output, whole.output

    chunked, whole, chunked_output, whole_output = products(params, two_input_batch())
    assert relative_error(chunked, whole) < 1e-12
    assert relative_error(chunked_output, whole_output) < 1e-12


def test_batch_axes_of_a_bare_array(build):
    case = CASES["softmax"]
    inner = mlp(case.event_shape)
    params, batch, _, vector, _ = problem(case, (7,))
    chunked = fvp.fisher(
        lambda params, x: inner(params, x.T), case.head, params, batch.T,
        chunk_size=4, batch_axes=1,
    )  # fmt: skip
    expected = fvp.fisher(inner, case.head, params, batch) @ vector
    assert relative_error(chunked @ vector, expected) < 1e-12
    first = fvp.fisher(inner, case.head, params, batch, chunk_size=4, batch_axes=-2)
    assert relative_error(first @ vector, expected) < 1e-12


# --- Transformations, Monte Carlo, memory -----------------------------------------------------


@every_curvature
def test_chunked_operator_crosses_jit_and_vmaps(build, curvature):
    case = CASES["softmax"]
    params, batch, weights, vector, targets = problem(case, (7,))

    @quick_jit
    def build_both(params, batch):
        arguments = mlp(case.event_shape), case.head, params, batch, targets, KEY
        return [
            build(curvature, *arguments, weights=weights, chunk_size=size) for size in (4, None)
        ]

    chunked, whole = build_both(params, batch)
    matrix, flat = whole.dense(), ravel_pytree(vector)[0]
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), vector)
    products = quick_jit(jax.vmap(lambda operator, v: operator @ v, (None, 0)))(chunked, stacked)
    expected = jnp.outer(jnp.array([1.0, 2.0, -1.0]), matrix @ flat)
    assert relative_error(jax.vmap(lambda p: ravel_pytree(p)[0])(products), expected) < 1e-12
    gradient = quick_jit(jax.grad(lambda v, operator: operator.quadratic_form(v)))
    product_twice = ravel_pytree(gradient(vector, chunked))[0]
    assert relative_error(product_twice, 2 * matrix @ flat) < 1e-12
    assert relative_error(quick_jit(lambda operator: operator.dense())(chunked), matrix) < 1e-12


@pytest.mark.parametrize("name", ["softmax", "sigmoid-2d", "gaussian-vector"])
def test_monte_carlo_labels_do_not_depend_on_the_chunks(name):
    case = CASES[name]
    params, batch, weights, vector, _ = problem(case, (7,))

    @quick_jit
    def products(key):
        def product(chunk_size):
            operator = fvp.mc_fisher(
                mlp(case.event_shape), case.head, params, batch, key,
                num_samples=3, weights=weights, chunk_size=chunk_size,
            )  # fmt: skip
            return operator @ vector

        return [product(chunk_size) for chunk_size in (None, 1, 4, 100)]

    whole, *chunked = products(KEY)
    for product in chunked:
        assert relative_error(product, whole) < 1e-12


@every_curvature
def test_chunks_bound_the_memory_of_a_product(build, curvature):
    case = CASES["softmax"]
    params, batch, _, vector, targets = problem(case, (4096,))

    def temporaries(chunk_size):
        def product(params, vector):
            operator = build(
                curvature, mlp(case.event_shape), case.head, params, batch, targets, KEY,
                chunk_size=chunk_size,
            )  # fmt: skip
            return operator @ vector

        compiled = quick_jit(product).lower(params, vector).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(32) < temporaries(None) / 8
