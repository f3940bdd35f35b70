"""Several outputs side by side, against dense references, through everything that takes a head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import CASES, product_matrix, quick_jit, rarely, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
PARTS = {"kind": CASES["softmax"], "count": CASES["poisson"], "flag": CASES["sigmoid-0d"]}
WEIGHTS = {"kind": 0.5, "count": 2.0, "flag": 3.0}
SIZES = {"kind": 3, "count": 3, "flag": 1}
X = jnp.asarray(RNG.normal(size=(6, 2)))
SHARES = jnp.asarray(RNG.uniform(0.5, 2.0, size=6)).at[2].set(0)
TARGETS = {name: case.targets(RNG, (6,)) for name, case in PARTS.items()}
PARAMS = {
    "hidden": jnp.asarray(RNG.normal(size=(2, 3))),
    "bias": jnp.asarray(RNG.normal(size=3)),
    **{name: jnp.asarray(RNG.normal(size=(3, size))) for name, size in SIZES.items()},
}
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def model(params, x):
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"])
    outputs = {name: hidden @ params[name] for name in SIZES}
    return outputs | {"flag": outputs["flag"][..., 0]}


def head_of(weighted):
    heads = {name: case.head for name, case in PARTS.items()}
    return fvp.Product(heads, WEIGHTS if weighted else None)


either = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def part(name):
    """The model of one output."""
    return lambda params, x: model(params, x)[name]


def summed(function, weighted):
    """The weighted sum over the outputs of ``function(name)``."""
    return sum((WEIGHTS[name] if weighted else 1) * function(name) for name in PARTS)


@functools.cache
def of_part(curvature, name):
    """The matrix of one part."""
    targets = () if curvature == "fisher" else (TARGETS[name],)
    problem = part(name), PARTS[name].head, PARAMS, X, *targets
    return product_matrix(getattr(fvp, curvature)(*problem, weights=SHARES))


def dense_sum(curvature, weighted):
    """The sum of the matrices of all parts."""
    return summed(lambda name: of_part(curvature, name), weighted)


@pytest.mark.parametrize(
    ("weighted", "chunk_size"), [(False, None), (True, None), (True, 4)], ids=str
)
@pytest.mark.parametrize("curvature", ["fisher", "ggn", "hessian"])
def test_curvature_is_the_weighted_sum_of_those_of_the_parts(curvature, chunk_size, weighted):
    build = getattr(fvp, curvature)
    targets = () if curvature == "fisher" else (TARGETS,)
    options = {"weights": SHARES, "chunk_size": chunk_size}
    F = build(model, head_of(weighted), PARAMS, X, *targets, **options)
    expected = dense_sum(curvature, weighted)
    assert relative_error(product_matrix(F), expected) < 1e-12
    np.testing.assert_allclose(F.quadratic_form(PARAMS), FLAT @ expected @ FLAT, rtol=1e-11)
    if chunk_size is None:
        assert relative_error(F.dense(), expected) < 1e-12


def test_output_is_the_dict_of_the_model():
    for chunk_size in (None, 4):
        F = fvp.fisher(model, head_of(False), PARAMS, X, chunk_size=chunk_size)
        expected = model(PARAMS, X)
        assert jax.tree.structure(F.output) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_allclose, F.output, expected)
        through = jax.jit(lambda F: F.output)(F)
        jax.tree.map(np.testing.assert_allclose, through, expected)


@pytest.mark.parametrize(("chunk_size", "weighted"), [(None, False), (4, True)])
def test_value_and_gradient_are_those_of_the_mean_loss(chunk_size, weighted):
    head = head_of(weighted)

    def loss(params):
        return jnp.sum(SHARES * head.nll(model(params, X), TARGETS)) / SHARES.sum()

    F = fvp.fisher(model, head, PARAMS, X, weights=SHARES, chunk_size=chunk_size)
    value, gradient = F.value_and_grad(TARGETS)
    expected = jax.value_and_grad(loss)(PARAMS)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    assert relative_error(gradient, expected[1]) < 1e-12


def test_empirical_fisher_is_that_of_the_gradients_of_the_sum():
    head = head_of(True)
    row = lambda flat: head.nll(model(UNRAVEL(flat), X), TARGETS)
    gradients = jax.jacobian(row)(FLAT)
    expected = gradients.T @ (SHARES[:, None] * gradients) / SHARES.sum()
    E = fvp.empirical_fisher(model, head, PARAMS, X, TARGETS, weights=SHARES)
    assert relative_error(product_matrix(E), expected) < 1e-12
    pushed = jax.jacobian(lambda flat: head.nll(model(UNRAVEL(flat), X), TARGETS).mean())(FLAT)
    problem = model, head, PARAMS, X
    E = fvp.empirical_fisher_vector_product(*problem, TARGETS, PARAMS)
    assert relative_error(ravel_pytree(E)[0], gradients.T @ (gradients @ FLAT) / 6) < 1e-12
    np.testing.assert_allclose(pushed, gradients.mean(0), rtol=1e-11)


def test_monte_carlo_fisher_is_unbiased():
    """Quadratic forms of 2,000 draws; z-scores below 5."""
    head = head_of(True)
    exact = fvp.fisher(model, head, PARAMS, X).quadratic_form(PARAMS)
    form = lambda key: fvp.mc_fisher(model, head, PARAMS, X, key).quadratic_form(PARAMS)
    values = np.asarray(quick_jit(jax.vmap(form))(jax.random.split(KEY, 2000)))
    assert abs(values.mean() - exact) / values.std() * np.sqrt(2000) < 5
    whole = fvp.mc_fisher(model, head, PARAMS, X, KEY) @ PARAMS
    chunks = fvp.mc_fisher(model, head, PARAMS, X, KEY, chunk_size=4) @ PARAMS
    assert relative_error(chunks, whole) < 1e-12


def test_one_call_products_equal_the_operators():
    problem = model, head_of(True), PARAMS, X
    expected = fvp.fisher(*problem) @ PARAMS
    assert relative_error(fvp.fisher_vector_product(*problem, PARAMS), expected) < 1e-12
    expected = fvp.ggn(*problem, TARGETS) @ PARAMS
    assert relative_error(fvp.ggn_vector_product(*problem, TARGETS, PARAMS), expected) < 1e-12


def test_layerwise_curvature_and_dual_solves():
    head = head_of(True)
    F = fvp.fisher(model, head, PARAMS, X, weights=SHARES)
    matrix = dense_sum("fisher", True)
    diagonal = fvp.fisher_diagonal(model, head, PARAMS, X, weights=SHARES)
    assert relative_error(ravel_pytree(diagonal)[0], jnp.diagonal(matrix)) < 1e-12
    gradient = F.value_and_grad(TARGETS)[1]
    damped = matrix + 1e-2 * jnp.eye(FLAT.size)
    expected = UNRAVEL(jnp.linalg.solve(damped, ravel_pytree(gradient)[0]))
    assert relative_error(fvp.solve_dual(F, gradient, 1e-2), expected) < 1e-10
    assert relative_error(fvp.solve_dual(F, gradient, 1e-2, targets=TARGETS), expected) < 1e-10
    G = fvp.ggn(model, head, PARAMS, X, TARGETS, weights=SHARES)
    assert relative_error(fvp.solve_dual(G, gradient, 1e-2), expected) < 1e-10
    solution, info = fvp.cg(F, gradient, damping=1e-2, tol=1e-12)
    assert info.converged
    assert relative_error(solution, expected) < 1e-8


def test_kfac_of_a_linear_model_at_one_example_is_its_fisher():
    linear = lambda p, x: {name: x @ p[name] for name in SIZES} | {"flag": (x @ p["flag"])[..., 0]}
    params = {name: PARAMS[name][:2] for name in SIZES}
    head = head_of(True)
    K = fvp.kfac(linear, head, params, X[:1])
    F = fvp.fisher(linear, head, params, X[:1]).dense()
    blocks = jax.scipy.linalg.block_diag(
        *(F[s, s] for s in (slice(0, 6), slice(6, 8), slice(8, 14)))  # count, flag, kind
    )
    assert relative_error(K.dense(), blocks) < 1e-12


def test_natural_gradient_trains():
    head = head_of(weighted=False)
    check_training(fvp.natural_gradient(1.0, model, head), head)


@pytest.mark.parametrize("solver", [rarely("cg"), "dual", rarely("dense")])
def test_natural_gradient_of_weighted_parts_trains(solver):
    head = head_of(weighted=True)
    rule = fvp.LevenbergMarquardt()
    check_training(fvp.natural_gradient(1.0, model, head, solver=solver, damping=rule), head)


def test_kfac_trains():
    head = head_of(weighted=True)
    check_training(optax.chain(fvp.scale_by_kfac(model, head), optax.scale(-1.0)), head)


def check_training(tx, head):
    loss = lambda params: head.nll(model(params, X), TARGETS).mean()

    @quick_jit
    def step(params, state):
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params, batch=X, targets=TARGETS)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(10):
        params, state = step(params, state)
    assert loss(params) < 0.8 * loss(PARAMS)


def test_statistics_of_several_outputs():
    head, new = head_of(True), jax.tree.map(lambda p: p + 0.1, PARAMS)
    of_part = lambda name: fvp.kl_divergence(
        part(name), PARTS[name].head, PARAMS, new, X, weights=SHARES
    )
    actual = fvp.kl_divergence(model, head, PARAMS, new, X, weights=SHARES)
    np.testing.assert_allclose(actual, summed(of_part, True), rtol=1e-12)
    both = fvp.Product({"a": fvp.Gaussian(), "b": fvp.Gaussian(2.0)})
    errors = fvp.standard_errors(lambda w, x: {"a": x @ w, "b": x @ w}, both, jnp.ones((2, 1)), X)
    expected = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(X.T @ X * 1.25)))
    np.testing.assert_allclose(errors[:, 0], expected, rtol=1e-12)


# --- The head itself ------------------------------------------------------------------------------

Z, U = model(PARAMS, X), model(jax.tree.map(lambda p: 0.3 * p, PARAMS), X)


@either
@pytest.mark.parametrize(
    ("method", "arguments", "power"),
    [
        ("score", (TARGETS,), 1),
        ("fisher", (U,), 1),
        ("hessian", (TARGETS, U), 1),
        ("sqrt_fisher", (U,), 0.5),
        ("sqrt_fisher_transpose", (U,), 0.5),
        ("mean", (), 0),
    ],
)
def test_methods_take_and_return_dicts(method, arguments, power, weighted):
    actual = getattr(head_of(weighted), method)(Z, *arguments)
    assert set(actual) == set(PARTS)
    for name, case in PARTS.items():
        weight = WEIGHTS[name] ** power if weighted else 1
        expected = weight * getattr(case.head, method)(Z[name], *(a[name] for a in arguments))
        np.testing.assert_allclose(actual[name], expected, rtol=1e-12)


@either
@pytest.mark.parametrize(("method", "argument"), [("nll", TARGETS), ("kl", U)])
def test_scalars_of_each_example_are_summed(method, argument, weighted):
    actual = getattr(head_of(weighted), method)(Z, argument)
    each = lambda name: getattr(PARTS[name].head, method)(Z[name], argument[name])
    np.testing.assert_allclose(actual, summed(each, weighted), rtol=1e-12)


def test_samples_are_targets():
    head = head_of(True)
    sample = head.sample(KEY, Z)
    assert jax.tree.map(jnp.shape, sample) == jax.tree.map(jnp.shape, TARGETS)
    assert jnp.isfinite(head.nll(Z, sample)).all()


def test_outputs_keep_their_dtypes():
    head = head_of(False)
    z = Z | {"kind": Z["kind"].astype(jnp.bfloat16)}
    assert head.fisher(z, z)["kind"].dtype == jnp.bfloat16
    assert head.fisher(z, z)["count"].dtype == jnp.float64
    assert head.nll(z, TARGETS).dtype == jnp.float64
    mixed = lambda p, x: {**model(p, x), "kind": model(p, x)["kind"].astype(jnp.float32)}
    F = fvp.fisher(mixed, head, PARAMS, X)
    assert F.output["kind"].dtype == jnp.float32
    assert F.output["count"].dtype == jnp.float64


@either
def test_a_product_is_a_record(weighted):
    head = head_of(weighted)
    copy = dataclasses.replace(head)
    assert copy == head
    assert hash(copy) == hash(head)
    assert len(jax.tree.leaves(head)) == (3 if weighted else 0)
    product = lambda head, z: head.fisher(z, z)
    expected = product(head, Z)
    for static in (None, 0):
        compiled = jax.jit(lambda head, z: product(head, z), static_argnums=static)
        assert relative_error(compiled(head, Z), expected) < 1e-12
        compiled(copy, Z)
        assert compiled._cache_size() == 1
    with pytest.raises(AttributeError):
        head.weights = None


def test_gradient_with_respect_to_the_weights():
    heads = {name: case.head for name, case in PARTS.items()}
    loss = lambda weights: fvp.Product(heads, weights).nll(Z, TARGETS).sum()
    gradient = jax.jit(jax.grad(loss))(WEIGHTS)
    for name, case in PARTS.items():
        np.testing.assert_allclose(gradient[name], case.head.nll(Z[name], TARGETS[name]).sum())


def test_what_does_not_fit_is_said_at_trace_time():
    head, other = head_of(False), {**Z, "flag": Z["flag"][:4]}
    trace = lambda function, *args: jax.eval_shape(function, *args)
    unequal = r"same batch axes in all outputs.*'flag': \(4,\).*fvp.stack_residuals"
    with pytest.raises(ValueError, match=unequal):
        trace(head.mean, other)
    with pytest.raises(ValueError, match=r"names \['count', 'flag', 'kind'\], got \['kind'\]"):
        trace(head.mean, {"kind": Z["kind"]})
    with pytest.raises(TypeError, match="Product expects a dict"):
        trace(head.mean, Z["kind"])
    with pytest.raises(TypeError, match="z: Product expects a dict of the model's outputs"):
        fvp.fisher(part("kind"), head, PARAMS, X)
    with pytest.raises(ValueError, match="targets: Product expects the targets under the names"):
        fvp.ggn(model, head, PARAMS, X, {"kind": TARGETS["kind"]})
    with pytest.raises(ValueError, match=r"z\['kind'\]: Softmax expects at least one batch axis"):
        trace(head.mean, {**Z, "kind": Z["kind"][0]})
    with pytest.raises(TypeError, match="heads: Product expects"):
        fvp.Product([fvp.Softmax()])
    with pytest.raises(TypeError, match=r"head: expected a head .* as heads\['a'\]"):
        fvp.Product({"a": 1.0})
    with pytest.raises(TypeError, match="a Product of Products"):
        fvp.Product({"a": head})
    with pytest.raises(ValueError, match="weights: Product expects one number for each"):
        fvp.Product({"a": fvp.Softmax()}, {"b": 1.0})
    with pytest.raises(ValueError, match=r"weights\['a'\]: expected one number of 0 or more"):
        fvp.Product({"a": fvp.Softmax()}, {"a": -1.0})


def test_posteriors_and_influence():
    head, size = head_of(True), FLAT.size
    total = SHARES.sum()
    fisher = dense_sum("fisher", True)
    covariance = jnp.linalg.inv(total * fisher + 0.5 * jnp.eye(size))

    def found():
        posterior = fvp.laplace(
            model, head, PARAMS, X, prior_precision=0.5, structure="dense", weights=SHARES
        )
        mean, variance = posterior.predictive(X)
        response = posterior.predictive_mean(X, KEY, num_samples=10)
        evidence = posterior.log_evidence(TARGETS)
        labels = {"train_targets": TARGETS, "query_targets": TARGETS}
        scores = fvp.influence(model, head, PARAMS, X, X, damping=0.1, tol=1e-12, **labels)
        return posterior.variance(), mean, variance, response, evidence, scores

    parameters, mean, variance, response, evidence, scores = quick_jit(found)()
    assert relative_error(ravel_pytree(parameters)[0], jnp.diag(covariance)) < 1e-8
    for name in PARTS:
        z = part(name)(PARAMS, X)
        J = jax.jacobian(lambda flat, name=name: part(name)(UNRAVEL(flat), X))(FLAT)
        assert relative_error(mean[name], z) < 1e-12
        assert relative_error(variance[name], jnp.einsum("...p,pq,...q", J, covariance, J)) < 1e-8
        assert response[name].shape == z.shape
    losses = lambda flat: summed(
        lambda name: PARTS[name].head.nll(part(name)(UNRAVEL(flat), X), TARGETS[name]), True
    )
    determinant = jnp.linalg.slogdet(jnp.eye(size) + 2 * total * fisher)[1]
    expected = -SHARES @ losses(FLAT) - 0.25 * FLAT @ FLAT - 0.5 * determinant
    np.testing.assert_allclose(evidence, expected, rtol=1e-9)
    gradients = jax.jacobian(losses)(FLAT)
    plain = lambda name: product_matrix(fvp.fisher(part(name), PARTS[name].head, PARAMS, X))
    damped = summed(plain, True) + 0.1 * jnp.eye(size)
    assert relative_error(scores, -gradients @ jnp.linalg.solve(damped, gradients.T)) < 1e-7
