"""One-call products: equality, cost in flops, and number of compilations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, reference, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True  # flops are settled before LLVM's optimizations

ONE_CALL = ["fisher", "ggn", "empirical_fisher"]
KEY = jax.random.key(0)

every_product = pytest.mark.parametrize("curvature", ONE_CALL)


def one_call(curvature, model, head, params, batch, targets, vector, **options):
    product = getattr(fvp, f"{curvature}_vector_product")
    labels = () if curvature == "fisher" else (targets,)
    return product(model, head, params, batch, *labels, vector, **options)


def problem(case, batch_axes=(6,), seed=0):
    rng = np.random.default_rng(seed)
    params = parameters(rng, case.size)
    batch = jnp.asarray(rng.normal(size=(*batch_axes, 2)))
    vector = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    return params, batch, case.targets(rng, batch_axes), vector


# --- Equality ---------------------------------------------------------------------------------


NAMES = ["softmax", "softmax-rows", "sigmoid-2d", "gaussian-precision"]


@pytest.mark.parametrize(
    ("curvature", "name", "weighted"),
    [
        (curvature, name, (i + j) % 2 == 1)
        for i, curvature in enumerate(ONE_CALL)
        for j, name in enumerate(NAMES)
    ],
)
def test_product_equals_the_dense_one(curvature, name, weighted):
    case = CASES[name]
    model = mlp(case.event_shape)
    params, batch, targets, vector = problem(case)
    weights = np.linspace(0.2, 2.0, 6)
    options = {"weights": weights} if weighted else {}
    product = one_call(curvature, model, case.head, params, batch, targets, vector, **options)
    expected = reference(case, model, params, batch, targets, weights if weighted else np.ones(6))
    assert jax.tree.structure(product) == jax.tree.structure(params)
    flat_product, flat_vector = ravel_pytree(product)[0], ravel_pytree(vector)[0]
    assert relative_error(flat_product, expected[curvature] @ flat_vector) < 1e-11


@every_product
def test_chunked_product_inside_jit_with_batch_axes(curvature):
    case = CASES["softmax"]
    inner = mlp(case.event_shape)
    params, batch, targets, vector = problem(case)

    def model(params, batch):
        return inner(params, batch["x"].T + batch["shift"])

    shared = {"x": batch.T, "shift": jnp.ones(2)}

    @jax.jit
    def product(params, vector):
        return one_call(
            curvature, model, case.head, params, shared, targets, vector,
            chunk_size=4, batch_axes={"x": 1, "shift": None},
        )  # fmt: skip

    expected = one_call(curvature, inner, case.head, params, batch + 1, targets, vector)
    assert relative_error(product(params, vector), expected) < 1e-12


@every_product
def test_a_chunked_product_holds_no_more_than_a_chunk(curvature):
    """Beside the whole batch, whose shape alone is asked for."""
    case = CASES["softmax"]
    inner, sizes = mlp(case.event_shape), set()
    params, batch, targets, vector = problem(case)

    def model(params, batch):
        sizes.add(len(batch))
        return inner(params, batch)

    arguments = model, case.head, params, batch, targets
    jax.eval_shape(lambda v: one_call(curvature, *arguments, v, chunk_size=2), vector)
    assert sizes == {6, 2}


@every_product
def test_products_vmap_over_vectors(curvature):
    case = CASES["softmax"]
    model = mlp(case.event_shape)
    params, batch, targets, vector = problem(case)
    vectors = jax.tree.map(lambda v: jnp.stack([v, -2 * v]), vector)
    arguments = model, case.head, params, batch, targets
    products = jax.vmap(lambda v: one_call(curvature, *arguments, v))(vectors)
    single = one_call(curvature, *arguments, vector)
    expected = jax.tree.map(lambda p: jnp.stack([p, -2 * p]), single)
    assert relative_error(products, expected) < 1e-12


# --- Compilations -----------------------------------------------------------------------------


def counting_model(case):
    """The model, and a list that grows by one whenever Python runs it."""
    inner, calls = mlp(case.event_shape), []

    def model(params, batch):
        calls.append(None)
        return inner(params, batch)

    return model, calls


@every_product
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_python_loop_over_one_model_compiles_once(curvature, chunk_size):
    case = CASES["softmax"]
    model, calls = counting_model(case)
    traces = []
    for seed in range(4):
        params, batch, targets, vector = problem(case, seed=seed)
        one_call(curvature, model, case.head, params, batch, targets, vector,
                 chunk_size=chunk_size)  # fmt: skip
        traces.append(len(calls))
    assert traces[0] > 0
    assert traces[1:] == traces[:1] * 3


def test_equal_heads_share_one_compilation():
    case = CASES["gaussian"]
    model, calls = counting_model(case)
    params, batch, _, vector = problem(case)
    traces = []
    for scale in (0.5, 0.5, 2.0, jnp.asarray(3.0), jnp.asarray(4.0)):
        head = fvp.Gaussian(scale=scale)
        fvp.fisher_vector_product(model, head, params, batch, vector)
        traces.append(len(calls))
    # Numbers and arrays may differ in their weak type; values never matter.
    assert traces[0] == traces[1] == traces[2]
    assert traces[3] == traces[4]


@pytest.mark.parametrize(
    ("curvature", "chunk_size"),
    [
        ("fisher", None),
        ("fisher", 4),
        ("ggn", None),
        ("empirical_fisher", 4),
        ("mc_fisher", None),
        ("hessian", 4),
    ],
)
def test_building_and_applying_operators_compiles_once(build, curvature, chunk_size):
    case = CASES["softmax"]
    model, calls = counting_model(case)

    @jax.jit
    def build_jitted(params, batch, targets, key):
        return build(
            curvature, model, case.head, params, batch, targets, key, chunk_size=chunk_size
        )

    apply = jax.jit(lambda operator, v: operator @ v)
    quadratic_form = jax.jit(lambda operator, v: operator.quadratic_form(v))
    traces = []
    for seed in range(3):
        params, batch, targets, vector = problem(case, seed=seed)
        operator = build_jitted(params, batch, targets, jax.random.key(seed))
        apply(operator, vector)
        quadratic_form(operator, vector)
        traces.append(len(calls))
    assert traces[0] > 0
    assert traces[1:] == traces[:1] * 2
    for compiled in (build_jitted, apply, quadratic_form):
        assert compiled._cache_size() == 1


def test_products_of_a_built_operator_do_not_run_the_model():
    case = CASES["softmax"]
    model, calls = counting_model(case)
    params, batch, _, vector = problem(case)
    operator = fvp.fisher(model, case.head, params, batch)
    built = len(calls)
    operator @ vector
    operator.quadratic_form(vector)
    jax.vmap(operator.mv)(jax.tree.map(lambda v: v[None], vector))
    assert len(calls) == built


# --- Cost -------------------------------------------------------------------------------------


def deep_model(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


@pytest.fixture(scope="module")
def mnist_sized():
    """784-512-512-10, batch 256, float32; shapes are all that a cost needs."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes = [784, 512, 512, 10]
    params = [(array(m, n), array(n)) for m, n in itertools.pairwise(sizes)]
    return params, array(256, 784), array(256, dtype=jnp.int32)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def gradient_flops(mnist_sized):
    def loss(params, x, y):
        log_p = jax.nn.log_softmax(deep_model(params, x))
        return -jnp.take_along_axis(log_p, y[:, None], axis=-1).mean()

    return flops(jax.grad(loss), *mnist_sized)


@pytest.fixture(scope="module")
def mnist_sized_operator(mnist_sized):
    def build_jitted(params, x):
        return fvp.fisher(deep_model, fvp.Softmax(), params, x)

    params, x, _ = mnist_sized
    return jax.eval_shape(jax.jit(build_jitted), params, x), params


@every_product
def test_a_product_from_scratch_costs_1_60_gradients(curvature, mnist_sized, gradient_flops):
    params, x, y = mnist_sized

    def product(params, x, y, vector):
        return one_call(curvature, deep_model, fvp.Softmax(), params, x, y, vector)

    assert flops(product, params, x, y, params) <= 1.60 * gradient_flops


def test_a_product_of_a_built_operator_costs_1_18_gradients(mnist_sized_operator, gradient_flops):
    operator, vector = mnist_sized_operator
    assert flops(lambda F, v: F @ v, operator, vector) <= 1.18 * gradient_flops


def test_a_quadratic_form_costs_0_60_gradients(mnist_sized_operator, gradient_flops):
    operator, vector = mnist_sized_operator
    assert flops(lambda F, v: F.quadratic_form(v), operator, vector) <= 0.60 * gradient_flops


def test_value_and_grad_of_a_built_operator_costs_a_backward_pass(
    mnist_sized, mnist_sized_operator, gradient_flops
):
    operator, _ = mnist_sized_operator
    targets = mnist_sized[2]
    assert flops(lambda F, y: F.value_and_grad(y), operator, targets) <= 0.62 * gradient_flops
