"""Curvature operators against dense matrices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import (
    CASES,
    CURVATURES,
    KINDS,
    each_kind_of_case,
    linear,
    linear_parameters,
    mlp,
    parameters,
    product_matrix,
    rarely,
    reference,
    relative_error,
)
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

ALL_CURVATURES = (*CURVATURES, "mc_fisher")
SAMPLED = [case for case in CASES.values() if case.name != "softmax-rows"]  # the head is softmax's
KEY = jax.random.key(7)

every_curvature = pytest.mark.parametrize("curvature", ALL_CURVATURES)


@functools.cache
def problem(case, batch_axes, model=mlp):
    """model_fn, params, batch and targets; equal data for (6,) and (3, 2)."""
    rng = np.random.default_rng(0)
    params = (parameters if model is mlp else linear_parameters)(rng, case.size)
    batch = jnp.asarray(rng.normal(size=(*batch_axes, 2)))
    return model(case.event_shape), params, batch, case.targets(rng, batch_axes)


def vector_like(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def flat(tree):
    return ravel_pytree(tree)[0]


# --- Dense equality ---------------------------------------------------------------------------


def weightings(batch_axes):
    full = np.random.default_rng(5).uniform(0.2, 2.0, batch_axes)
    return {"none": None, "full": full, "broadcast": full[:1]}


# Every head with weights, and some without; one of them with all axes and weights.
AXES, WEIGHTINGS = [(6,), (3, 2)], ["none", "full", "broadcast"]
OTHERS = [case for case in CASES.values() if case.name != "softmax"]
WEIGHTED = [
    *((case, (3, 2), "full") for case in OTHERS),
    *(rarely(case, (6,), "none") for case in OTHERS),
    *itertools.product([CASES["softmax"]], AXES, WEIGHTINGS),
]


@pytest.mark.parametrize(
    ("case", "batch_axes", "weighting"),
    WEIGHTED,
    ids=lambda value: getattr(value, "name", None),
)
def test_operators_equal_their_dense_matrices(build, case, batch_axes, weighting):
    model, params, batch, targets = problem(case, batch_axes)
    weights = weightings(batch_axes)[weighting]

    @jax.jit
    def dense(params, batch, targets, weights):
        arguments = model, case.head, params, batch, targets, KEY
        return {
            name: product_matrix(build(name, *arguments, weights=weights)) for name in CURVATURES
        }

    full_weights = np.broadcast_to(1.0 if weights is None else weights, batch_axes)
    # The reference sees 6 flat examples either way.
    expected = reference(
        case, model, params, batch.reshape(6, 2), case.rows(targets), full_weights.reshape(6)
    )
    for curvature, matrix in dense(params, batch, targets, weights).items():
        assert relative_error(matrix, expected[curvature]) < 1e-11, curvature


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gaussian"])
def test_operators_of_a_network_whose_outputs_start_at_zero(build, name):
    """At exactly zero logits a careless |z| has no derivative."""
    case = CASES[name]
    model, params, batch, targets = problem(case, (6,))
    params = {**params, "out": jax.tree.map(jnp.zeros_like, params["out"])}

    @jax.jit
    def dense(params):
        arguments = model, case.head, params, batch, targets, KEY
        return {name: product_matrix(build(name, *arguments)) for name in CURVATURES}

    expected = reference(case, model, params, batch, targets, np.ones(6))
    for curvature, matrix in dense(params).items():
        assert relative_error(matrix, expected[curvature]) < 1e-11, curvature


@each_kind_of_case
def test_fisher_is_ggn_is_hessian_for_a_linear_model(build, case):
    model, params, batch, targets = problem(case, (3, 2), linear)
    weights = weightings((3, 2))["full"]

    @jax.jit
    def dense(params, weights):
        arguments = model, case.head, params, batch, targets, KEY
        curvatures = ("fisher", "ggn", "hessian")
        return [product_matrix(build(name, *arguments, weights=weights)) for name in curvatures]

    fisher, ggn, hessian = dense(params, weights)

    def loss(flat):
        nll = -jax.vmap(case.log_prob)(
            model(ravel_pytree(params)[1](flat), batch).reshape(6, case.size), case.rows(targets)
        )
        return jnp.sum(weights.reshape(6) * nll) / weights.sum()

    expected = jax.jit(jax.hessian(loss))(flat(params))
    natural = isinstance(case.head, fvp.NaturalHead)
    for matrix in (fisher, ggn, hessian) if natural else (ggn, hessian):
        assert relative_error(matrix, expected) < 1e-11
    assert (relative_error(fisher, expected) < 1e-11) == natural


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (3, 1), (1, 2), (3, 2)], ids=str)
def test_weights_broadcast_to_the_batch_axes(shape):
    case = CASES["sigmoid"]
    model, params, batch, targets = problem(case, (3, 2))
    weights = np.random.default_rng(2).uniform(0.2, 2.0, shape)

    @jax.jit
    def dense(weights):
        operator = fvp.empirical_fisher(model, case.head, params, batch, targets, weights=weights)
        return product_matrix(operator)

    full_weights = np.broadcast_to(weights, (3, 2)).copy()
    expected = reference(case, model, params, batch, targets, full_weights)["empirical_fisher"]
    assert relative_error(dense(weights), expected) < 1e-11


@every_curvature
def test_scaling_the_weights_changes_nothing(build, curvature):
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (3, 2))
    weights = weightings((3, 2))["full"]

    @jax.jit
    def dense(weights):
        arguments = model, case.head, params, batch, targets, KEY
        return product_matrix(build(curvature, *arguments, weights=weights))

    assert relative_error(dense(1000 * weights), dense(weights)) < 1e-12


def test_positions_that_share_inputs_count_as_one_example_each(build):
    """(B, T) with a model that mixes over T: examples are the positions, not the sequences."""
    case = CASES["softmax"]
    _, params, batch, targets = problem(case, (3, 2))
    pointwise = mlp(case.event_shape)

    def model(params, batch):
        return pointwise(params, jnp.cumsum(batch, axis=1))

    weights = weightings((3, 2))["full"]
    expected = reference(case, model, params, batch, targets, weights)

    @jax.jit
    def dense(params):
        arguments = model, case.head, params, batch, targets, KEY
        return {
            name: product_matrix(build(name, *arguments, weights=weights)) for name in CURVATURES
        }

    for curvature, matrix in dense(params).items():
        assert relative_error(matrix, expected[curvature]) < 1e-11, curvature


# --- Masks ------------------------------------------------------------------------------------

GARBAGE = [np.nan, np.inf, -np.inf, 1e300]


@pytest.mark.each_value
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gaussian-precision"])
@every_curvature
def test_masked_rows_leave_no_trace(build, name, curvature):
    """Weight 0 equals absence, whatever the targets and outputs of the row are."""
    case = CASES[name]
    inner, params, batch, targets = problem(case, (6,))
    kept, masked = np.array([1, 3]), np.array([0, 2, 4, 5])
    weights = np.zeros(6)
    weights[kept] = [0.5, 2.0]
    offsets = jnp.asarray([0, *GARBAGE])  # by integers: inputs that are NaN would be replaced
    none = np.zeros(6, int)
    offset = none.copy()
    offset[masked] = 1 + np.arange(4)

    def model(params, batch):
        x, offset = batch
        return inner(params, x) + offsets[offset][:, None]

    bad_targets = targets.at[masked].set(-100 if case.integer_targets else np.nan)

    @jax.jit
    def everything(offset, targets):
        arguments = model, case.head, params, (batch, offset), targets, KEY
        operator = build(curvature, *arguments, weights=weights)
        return product_matrix(operator), *operator.value_and_grad(targets)

    matrix, value, gradient = everything(offset, bad_targets)
    expected = reference(case, inner, params, batch[kept], targets[kept], weights[kept])
    if curvature == "mc_fisher":
        # The labels of the kept rows are drawn alike when nothing is wrong with the others.
        expected["mc_fisher"] = everything(none, targets)[0]
    assert relative_error(matrix, expected[curvature]) < 1e-11
    assert relative_error(value, expected["loss"]) < 1e-11
    assert relative_error(flat(gradient), expected["gradient"]) < 1e-11


@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize(
    ("batch_axes", "chunk_size"), [((6,), 2), ((3, 2), None)], ids=["B chunked", "BT whole"]
)
def test_masked_inputs_leave_no_trace(build, curvature, batch_axes, chunk_size):
    """Where an input is not finite neither is the Jacobian, and zero times it would be NaN."""
    case = CASES["softmax"]
    inner, params, batch, targets = problem(case, batch_axes)
    kept, masked = np.array([1, 3]), np.array([0, 2, 4, 5])
    weights = np.zeros(6)
    weights[kept] = [0.5, 2.0]
    bad = batch.reshape(6, 2).at[masked, 1].set(np.array([np.nan, np.inf, -np.inf, np.nan]))
    bad_targets = targets.reshape(6).at[masked].set(-1).reshape(batch_axes)

    @jax.jit
    def everything(batch, targets):
        data = {"x": batch, "shared": jnp.asarray([np.inf, 1.0]), "count": jnp.arange(6)}
        model = lambda params, batch: inner(params, batch["x"]) / (1 / batch["shared"])[1]
        operator = build(
            curvature, model, case.head, params, data, targets, KEY,
            weights=weights.reshape(batch_axes), chunk_size=chunk_size,
            batch_axes={"x": 0, "shared": None, "count": None},
        )  # fmt: skip
        return product_matrix(operator), *operator.value_and_grad(targets)

    matrix, value, gradient = everything(bad.reshape(batch.shape), bad_targets)
    rows, labels = batch.reshape(6, 2)[kept], targets.reshape(6)[kept]
    expected = reference(case, inner, params, rows, labels, weights[kept])
    if curvature == "mc_fisher":
        expected["mc_fisher"] = everything(batch, targets)[0]
    assert relative_error(matrix, expected[curvature]) < 1e-11
    assert relative_error(value, expected["loss"]) < 1e-11
    assert relative_error(flat(gradient), expected["gradient"]) < 1e-11


@pytest.mark.parametrize(
    ("curvature", "axis"), list(zip(ALL_CURVATURES, itertools.cycle([1, -1]), strict=False))
)
def test_masked_inputs_along_another_axis_leave_no_trace(build, curvature, axis):
    case = CASES["softmax"]
    inner, params, batch, targets = problem(case, (6,))
    weights = np.array([0, 1, 0, 2, 1, 1.0])
    arguments = case.head, params
    model = lambda params, x: inner(params, x.T)
    v = vector_like(params)

    @jax.jit
    def products(batch, bad):
        expected = build(curvature, inner, *arguments, batch, targets, KEY, weights=weights)
        actual = build(
            curvature, model, *arguments, bad, targets, KEY, weights=weights, batch_axes=axis
        )
        return flat(actual @ v), flat(expected @ v)

    assert relative_error(*products(batch, batch.at[2].set(np.nan).T)) < 1e-11


@pytest.mark.parametrize("batch_axes", [(6,), (3, 2)], ids=["B", "BT"])
def test_inputs_that_are_not_finite_become_those_of_the_first_row_with_weight(batch_axes):
    """And not zeros, where a norm in the model would have no derivative."""
    case = CASES["softmax"]
    inner, params, batch, _ = problem(case, batch_axes)
    model = lambda params, x: inner(params, x / jnp.linalg.norm(x, axis=-1, keepdims=True))
    weights = np.array([0, 0, 0, 2, 1, 0.0])
    bad = batch.reshape(6, 2).at[np.array([1, 5]), 0].set(np.nan).reshape(batch.shape)
    mended = batch.reshape(6, 2).at[np.array([1, 5])].set(batch.reshape(6, 2)[3])
    operator = fvp.fisher(model, case.head, params, bad, weights=weights.reshape(batch_axes))
    expected = model(params, mended)
    assert relative_error(operator.output.reshape(6, 3), expected) < 1e-13
    assert np.all(np.isfinite(flat(operator @ vector_like(params))))


def test_finite_inputs_of_masked_rows_still_reach_the_others():
    """Message passing: a row without weight may be the input of one with it."""
    case = CASES["softmax"]
    inner, params, batch, _ = problem(case, (6,))
    model = lambda params, x: inner(params, jnp.cumsum(x, axis=0))
    weights = np.array([0, 1, 0, 1, 1, 1.0])
    actual = product_matrix(fvp.fisher(model, case.head, params, batch, weights=weights))
    summed = jnp.cumsum(batch, axis=0)
    expected = product_matrix(fvp.fisher(inner, case.head, params, summed, weights=weights))
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_batch_without_any_weight_gives_zero_whatever_it_holds(build, curvature, chunk_size):
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))

    @jax.jit
    def everything(batch, weights):
        arguments = model, case.head, params, batch, targets, KEY
        operator = build(curvature, *arguments, weights=weights, chunk_size=chunk_size)
        return operator @ params, operator.value_and_grad(targets)

    for leaf in jax.tree.leaves(everything(batch * np.nan, np.zeros(6))):
        assert np.array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_rows_of_any_sum_have_the_curvature_of_their_nll(build, curvature):
    """Zeros for "ignore", several hot classes; `fisher` stays that of the model's own labels."""
    case = CASES["softmax-rows"]
    model, params, batch, _ = problem(case, (6,))
    targets = jnp.asarray(
        [[0, 0, 0], [1, 0, 1], [0.2, 0.1, 0.3], [2, 0.5, 4], [0, 1, 0], [0.2, 0.3, 0.5]]
    )
    expected = reference(case, model, params, batch, targets, np.ones(6))
    operator = build(curvature, model, case.head, params, batch, targets, KEY)
    value, gradient = operator.value_and_grad(targets)
    assert relative_error(product_matrix(operator), expected[curvature]) < 1e-11
    assert relative_error(value, expected["loss"]) < 1e-12
    assert relative_error(flat(gradient), expected["gradient"]) < 1e-11
    fisher = product_matrix(fvp.fisher(model, case.head, params, batch))
    assert relative_error(fisher, expected["fisher"]) < 1e-11


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_narrow_labels_of_many_classes(dtype):
    """A label's type may hold fewer numbers than there are classes."""
    rng = np.random.default_rng(0)
    params, x = jnp.asarray(rng.normal(size=(2, 300))), jnp.asarray(rng.normal(size=(4, 2)))
    y = jnp.asarray([0, 44, 100, 127])
    model = lambda w, x: x @ w

    def everything(y):
        operator = fvp.empirical_fisher(model, fvp.Softmax(), params, x, y)
        return operator @ params, operator.value_and_grad(y)

    assert relative_error(everything(y.astype(dtype)), everything(y)) < 1e-14


@pytest.mark.each_value
@every_curvature
@pytest.mark.parametrize("name", ["softmax", "gaussian"])
def test_weights_that_sum_to_zero_give_zero(build, name, curvature):
    case = CASES[name]
    model, params, batch, targets = problem(case, (6,))

    @jax.jit
    def everything(weights):
        operator = build(curvature, model, case.head, params, batch, targets, KEY, weights=weights)
        v = vector_like(params)
        return operator.mv_and_form(v), operator.quadratic_form(v), operator.value_and_grad(targets)

    for leaf in jax.tree.leaves(everything(np.zeros(6))):
        assert np.array_equal(leaf, np.zeros(leaf.shape))


# --- Monte Carlo ------------------------------------------------------------------------------


def sampled_case(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


@sampled_case("softmax", "sigmoid-0d", "sigmoid")
def test_monte_carlo_matrix_is_a_mean_of_outer_products_of_possible_scores(case):
    """Two examples: the matrix must be that of one of the possible pairs of labels."""
    model, params, batch, _ = problem(case, (6,))
    batch, weights = batch[:2], np.array([0.5, 2.0])
    values, unravel = ravel_pytree(params)

    def candidate(labels):
        def log_prob(values):
            z = model(unravel(values), batch).reshape(2, case.size)
            return jax.vmap(case.log_prob)(z, labels)

        gradients = jax.jacobian(log_prob)(values)
        return jnp.einsum("n,np,nq->pq", weights / weights.sum(), gradients, gradients)

    pairs = jnp.asarray(list(itertools.product(case.outcomes, repeat=2)))
    candidates = jax.jit(jax.vmap(candidate))(pairs)

    @jax.jit
    @jax.vmap
    def dense(key):
        return fvp.mc_fisher(model, case.head, params, batch, key, weights=weights).dense()

    matrices = dense(jax.random.split(KEY, 40))
    distance = jnp.abs(matrices[:, None] - candidates).max((2, 3)).min(1)
    assert distance.max() < 1e-12 * jnp.abs(candidates).max()


@pytest.mark.parametrize(
    ("case", "batch_axes"),
    [
        *((case, (6,)) if case.name in KINDS else rarely(case, (6,)) for case in SAMPLED),
        *((CASES[name], (3, 2)) for name in ("softmax", "sigmoid-2d", "gaussian-precision")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_monte_carlo_fisher_has_the_fisher_as_its_expectation(case, batch_axes):
    model, params, batch, targets = problem(case, batch_axes)
    weights, count = weightings(batch_axes)["full"], 500

    @jax.jit
    @jax.vmap
    def dense(key):
        return fvp.mc_fisher(
            model, case.head, params, batch, key, num_samples=4, weights=weights
        ).dense()

    matrices = np.asarray(dense(jax.random.split(KEY, count)))
    expected = reference(
        case, model, params, batch.reshape(6, 2), case.rows(targets), weights.reshape(6)
    )["fisher"]
    errors = matrices.std(0) / np.sqrt(count) + 1e-12
    assert (np.abs(matrices.mean(0) - expected) / errors).max() < 5


@sampled_case("softmax", "sigmoid", "gaussian-precision")
@pytest.mark.parametrize("num_samples", [1, 2])
def test_monte_carlo_fisher_is_positive_semidefinite_of_bounded_rank(case, num_samples):
    model, params, batch, _ = problem(case, (6,))

    @jax.jit
    def dense(key):
        operator = fvp.mc_fisher(model, case.head, params, batch[:3], key, num_samples=num_samples)
        return product_matrix(operator)

    matrix = dense(KEY)
    assert relative_error(matrix, matrix.T) < 1e-13
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    tolerance = 1e-12 * eigenvalues.max()
    assert eigenvalues.min() > -tolerance
    assert 0 < (eigenvalues > tolerance).sum() <= 3 * num_samples


def test_monte_carlo_labels_of_equal_examples_are_drawn_apart():
    """Of 400 equal coins each shows its own side: 0.8 of them one and 0.2 the other."""
    w, x, p = jnp.full(1, np.log(4.0)), jnp.ones((400, 1)), 0.8
    matrix = fvp.mc_fisher(lambda w, x: x @ w, fvp.Sigmoid(event_ndim=0), w, x, KEY).dense()
    ones = 400 * (matrix[0, 0] - p**2) / ((1 - p) ** 2 - p**2)  # squared scores are mixed
    np.testing.assert_allclose(ones, np.round(ones), atol=1e-9)
    assert abs(ones - 400 * p) < 5 * np.sqrt(400 * p * (1 - p))


def test_monte_carlo_fisher_is_one_matrix_for_one_key():
    case = CASES["softmax"]
    model, params, batch, _ = problem(case, (6,))
    build_jitted = jax.jit(lambda key: fvp.mc_fisher(model, case.head, params, batch, key))
    operator, v = build_jitted(KEY), vector_like(params)
    first = operator @ v
    assert np.array_equal(flat(operator @ v), flat(first))
    assert np.array_equal(flat(build_jitted(KEY) @ v), flat(first))
    assert relative_error(flat(first), product_matrix(operator) @ flat(v)) < 1e-13
    assert not np.array_equal(flat(build_jitted(jax.random.key(8)) @ v), flat(first))


def test_monte_carlo_fisher_accepts_legacy_keys():
    case = CASES["softmax"]
    model, params, batch, _ = problem(case, (6,))
    legacy, typed = jax.random.PRNGKey(7), jax.random.key(7)
    dense = jax.jit(lambda key: fvp.mc_fisher(model, case.head, params, batch, key).dense())
    matrices = dense(legacy), dense(typed)
    assert relative_error(*matrices) < 1e-13


# --- The interface of an operator -------------------------------------------------------------


@pytest.fixture(scope="module")
def operators(build):
    """Softmax operators of every curvature, each built inside jit and returned from it."""
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (3, 2))
    weights = weightings((3, 2))["full"]

    @jax.jit
    def build_all(params, batch, targets, weights):
        arguments = model, case.head, params, batch, targets, KEY
        return {name: build(name, *arguments, weights=weights) for name in ALL_CURVATURES}

    expected = reference(
        case, model, params, batch.reshape(6, 2), targets.reshape(6), weights.reshape(6)
    )
    return build_all(params, batch, targets, weights), params, targets, expected


@every_curvature
def test_operator_crosses_jit_boundaries(operators, curvature):
    operator, params, _, expected = operators[0][curvature], *operators[1:]
    matrix = expected.get(curvature, product_matrix(operator))
    v = vector_like(params)

    def check(product):
        assert jax.tree.structure(product) == jax.tree.structure(params)
        assert relative_error(flat(product), matrix @ flat(v)) < 1e-11

    check(operator @ v)
    check(operator.mv(v))
    check(jax.jit(lambda v: operator @ v)(v))
    check(jax.jit(lambda operator, v: operator @ v)(operator, v))
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(operator)))
    check(rebuilt @ v)


@every_curvature
def test_vmap_and_scan_over_vectors(operators, curvature):
    operator, params, _, expected = operators[0][curvature], *operators[1:]
    matrix = expected.get(curvature, product_matrix(operator))
    size = flat(params).size
    unravel = ravel_pytree(params)[1]
    vectors = np.random.default_rng(3).normal(size=(4, size))
    stacked = jax.vmap(unravel)(vectors)

    def scanned(operator, stacked):
        return jax.lax.scan(lambda carry, v: (carry, operator @ v), None, stacked)[1]

    for products in (
        jax.vmap(operator.mv)(stacked),
        jax.jit(jax.vmap(lambda operator, v: operator @ v, (None, 0)))(operator, stacked),
        jax.jit(scanned)(operator, stacked),
    ):
        assert relative_error(jax.vmap(flat)(products), vectors @ matrix) < 1e-11


@every_curvature
def test_quadratic_form_and_its_gradient(operators, curvature):
    operator, params, _, expected = operators[0][curvature], *operators[1:]
    matrix = expected.get(curvature, product_matrix(operator))
    v = vector_like(params)
    value, gradient = jax.jit(jax.value_and_grad(lambda v: operator.quadratic_form(v)))(v)
    assert value.shape == ()
    np.testing.assert_allclose(value, flat(v) @ matrix @ flat(v), rtol=1e-11)
    assert relative_error(flat(gradient), 2 * matrix @ flat(v)) < 1e-11
    w = jax.tree.map(lambda x: jnp.cos(3 * x), v)
    _, form = jax.jit(lambda v: operator.mv_and_form(v))(v)
    np.testing.assert_allclose(form, value, rtol=1e-11)
    both = np.stack([flat(v), flat(w)])
    found = jax.jit(lambda v, w: operator.inner_products(v, w))(v, w)
    np.testing.assert_allclose(found, both @ matrix @ both.T, rtol=1e-9)


@every_curvature
def test_value_and_grad_equals_that_of_the_dense_loss(operators, curvature):
    operator, params, targets, expected = operators[0][curvature], *operators[1:]
    value, gradient = operator.value_and_grad(targets)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-13)
    assert relative_error(flat(gradient), expected["gradient"]) < 1e-12


@pytest.mark.parametrize("name", ["softmax-rows", "sigmoid-2d", "gaussian-precision"])
def test_value_and_grad_of_other_heads(name):
    case = CASES[name]
    model, params, batch, targets = problem(case, (3, 2))
    weights = weightings((3, 2))["full"]
    operator = fvp.fisher(model, case.head, params, batch, weights=weights)
    value, gradient = operator.value_and_grad(targets)
    expected = reference(
        case, model, params, batch.reshape(6, 2), case.rows(targets), weights.reshape(6)
    )
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-13)
    assert relative_error(flat(gradient), expected["gradient"]) < 1e-12


@pytest.mark.compile_in_full
@every_curvature
def test_output_is_the_output_of_the_model(build, curvature):
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))
    operator = build(curvature, model, case.head, params, batch, targets, KEY)
    assert np.array_equal(operator.output, jax.jit(model)(params, batch))


@every_curvature
def test_operators_vmap_over_models(build, curvature):
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    v = vector_like(params)

    def product(params):
        return build(curvature, model, case.head, params, batch, targets, KEY) @ v

    together, one = jax.jit(jax.vmap(product))(members), jax.jit(product)
    one_by_one = [one(jax.tree.map(lambda p, i=i: p[i], members)) for i in range(3)]
    expected = jax.tree.map(lambda *p: jnp.stack(p), *one_by_one)
    assert relative_error(together, expected) < 1e-12


def test_curvature_is_differentiable_in_the_scale_of_the_head():
    case = CASES["gaussian"]
    model, params, batch, _ = problem(case, (6,))
    v = vector_like(params)

    @jax.jit
    @jax.value_and_grad
    def quadratic_form(scale):
        return fvp.fisher(model, fvp.Gaussian(scale=scale), params, batch).quadratic_form(v)

    value, gradient = quadratic_form(0.7)
    np.testing.assert_allclose(gradient, -2 * value / 0.7, rtol=1e-12)


def test_head_is_a_jit_argument_of_an_operator():
    case = CASES["gaussian-precision"]
    model, params, batch, targets = problem(case, (6,))
    compiled = jax.jit(lambda head, params: product_matrix(fvp.fisher(model, head, params, batch)))
    expected = reference(case, model, params, batch, targets, np.ones(6))["fisher"]
    assert relative_error(compiled(case.head, params), expected) < 1e-11


# --- Parameters of every kind -----------------------------------------------------------------


def test_dense_is_in_ravel_pytree_order():
    """Diagonal curvature, distinct entries: sum_i theta_i x_i with one output per parameter."""
    params = {"b": jnp.ones(2), "a": [jnp.ones((1, 2)), (jnp.ones(()),)], "none": None}
    scale = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])

    def model(params, batch):
        return batch * ravel_pytree(params)[0]

    matrix = fvp.fisher(model, fvp.Gaussian(), params, scale[None]).dense()
    np.testing.assert_allclose(matrix, np.diag(scale**2), rtol=1e-13)


@every_curvature
def test_none_leaves_in_params(build, curvature):
    case = CASES["softmax"]
    inner, params, batch, targets = problem(case, (6,))

    def model(params, batch):
        return inner(params["net"], batch)

    wrapped = {"net": params, "frozen": None, "more": [None, None]}
    v = vector_like(wrapped)

    @jax.jit
    def products(wrapped, params, v):
        arguments = batch, targets, KEY
        return (
            build(curvature, model, case.head, wrapped, *arguments) @ v,
            build(curvature, inner, case.head, params, *arguments) @ v["net"],
        )

    product, expected = products(wrapped, params, v)
    assert jax.tree.structure(product) == jax.tree.structure(wrapped)
    assert relative_error(product["net"], expected) < 1e-12


def astype(tree, dtype):
    return jax.tree.map(lambda p: p.astype(dtype), tree)


MIXED = [*((curvature, None) for curvature in ALL_CURVATURES), ("fisher", 4), ("hessian", 4)]


@pytest.mark.parametrize(("curvature", "chunk_size"), MIXED)
def test_params_of_mixed_dtypes(build, curvature, chunk_size):
    """Each leaf of the product has the dtype of its parameter, and loses no more than that."""
    case = CASES["softmax"]
    inner, params, batch, targets = problem(case, (6,))
    dtypes = {
        "out": {"w": jnp.float32, "b": jnp.float64},
        "hidden": {"w": jnp.bfloat16, "b": jnp.float16},
    }
    mixed = jax.tree.map(lambda p, dtype: p.astype(dtype), params, dtypes)
    v = vector_like(mixed)

    def model(params, batch):
        return inner(astype(params, jnp.float64), batch)

    @jax.jit
    def products(params, v, wide_params, wide_v):
        arguments = batch, targets, KEY
        operator = build(curvature, model, case.head, params, *arguments, chunk_size=chunk_size)
        exact = build(curvature, inner, case.head, wide_params, *arguments)
        return operator @ v, operator.value_and_grad(targets)[1], exact @ wide_v

    wide = astype(mixed, jnp.float64), astype(v, jnp.float64)
    product, gradient, expected = products(mixed, v, *wide)
    for tree in (product, gradient):
        assert jax.tree.map(lambda p: p.dtype, tree) == jax.tree.map(jnp.dtype, dtypes)
    for actual, value in zip(jax.tree.leaves(product), jax.tree.leaves(expected), strict=True):
        assert relative_error(actual, value) < max(1e-12, jnp.finfo(actual.dtype).eps)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_narrow_models_give_narrow_products(build, curvature):
    """A bfloat16 model: products in bfloat16, equal to float64 within the model's own rounding."""
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))
    narrow = astype((params, batch, vector_like(params)), jnp.bfloat16)
    wide = astype(narrow, jnp.float64)

    @jax.jit
    def product(params, batch, v):
        return build(curvature, model, case.head, params, batch, targets, KEY) @ v

    actual = product(*narrow)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
    assert relative_error(actual, product(*wide)) < 0.05


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_loss_of_a_narrow_model_is_that_of_its_outputs(build, curvature):
    """In float32: only the outputs are rounded to bfloat16."""
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))
    narrow = astype((params, batch), jnp.bfloat16)
    operator = build(curvature, model, case.head, *narrow, targets, KEY)
    value, _ = operator.value_and_grad(targets)
    expected = -jax.vmap(case.log_prob)(operator.output.astype(jnp.float64), targets).mean()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("weight", [None, 1e5])
def test_float16_overflows_in_no_sum_whose_mean_is_representable(weight):
    """Means of 25 over 4096 examples: their sum is beyond the range of float16."""
    x = jnp.full((4096, 1), 5.0, jnp.float16)
    w = jnp.ones((1, 1), jnp.float16)
    weights = None if weight is None else np.full(4096, weight)
    operator = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x, weights=weights)
    _, gradient = operator.value_and_grad(jnp.zeros_like(x))
    for value in (operator @ w, operator.quadratic_form(w), gradient):
        assert relative_error(value, jnp.full(value.shape, 25.0)) < 1e-3


def test_forms_are_wider_than_float16():
    """300^2 is beyond its range."""
    x, w = jnp.full((4, 1), 300, jnp.float16), jnp.ones((1, 1), jnp.float16)
    operator = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x)
    for form in (operator.quadratic_form(w), operator.mv_and_form(w)[1]):
        assert form.dtype == jnp.float32
        np.testing.assert_allclose(form, 300.0**2, rtol=1e-6)


def test_numpy_arrays_are_as_good_as_jax_arrays():
    case = CASES["softmax"]
    model, params, batch, targets = problem(case, (6,))
    as_numpy = functools.partial(jax.tree.map, np.asarray)
    arguments = as_numpy(params), as_numpy(batch), as_numpy(targets)
    v = as_numpy(vector_like(params))
    product = fvp.ggn(model, case.head, *arguments, weights=np.ones(6)) @ v
    expected = fvp.ggn(model, case.head, params, batch, targets) @ v
    assert relative_error(product, expected) < 1e-12


# --- KL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "sigmoid-2d", "gaussian-precision"])
def test_quadratic_form_is_twice_the_kl_of_a_small_step(name):
    case = CASES[name]
    model, params, batch, _ = problem(case, (3, 2))
    weights = weightings((3, 2))["full"]
    d = jax.tree.map(lambda v: 1e-4 * v, vector_like(params))

    @jax.jit
    def both(params, d):
        kl = case.head.kl(model(params, batch), model(jax.tree.map(jnp.add, params, d), batch))
        operator = fvp.fisher(model, case.head, params, batch, weights=weights)
        return jnp.sum(weights * kl) / weights.sum(), operator.quadratic_form(d)

    kl, quadratic = both(params, d)
    np.testing.assert_allclose(2 * kl / quadratic, 1.0, atol=1e-3)


# --- Many rows --------------------------------------------------------------------------------


@pytest.mark.compile_in_full
@pytest.mark.parametrize("name", ["softmax", "gaussian-precision"])
def test_curvature_of_many_rows_equals_numpy(name):
    rows = 70_000  # some compilers miscompile batched quadratic forms from 32,769 rows on
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(rows, 2)), rng.normal(size=(2, 4))
    z = x @ w
    if name == "softmax":
        head, p = fvp.Softmax(), np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        root = np.sqrt(p)[:, :, None] * (np.eye(4) - p[:, None, :])  # rows of S^T
    else:
        factor = rng.normal(size=(4, 4))
        head = fvp.Gaussian(precision=factor @ factor.T)
        root = np.broadcast_to(factor.T, (rows, 4, 4))
    v = rng.normal(size=(2, 4))
    jv = np.einsum("nij,nj->ni", root, x @ v)
    expected = np.einsum("ni,nij->nj", jv, root)
    operator = jax.jit(lambda w: fvp.fisher(lambda w, x: x @ w, head, w, x))(w)
    assert relative_error(operator @ v, x.T @ expected / rows) < 1e-11
    np.testing.assert_allclose(operator.quadratic_form(v), (jv**2).sum() / rows, rtol=1e-11)
