"""Estimates and their errors: closed forms, singular information, coverage, functions of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from dense import CASES, mlp, parameters, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(40, 3))).at[:, 0].set(1)
BETA = jnp.asarray([0.3, -0.5, 0.8])[:, None]
WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2.0, size=40)).at[3].set(0)


def linear(beta, x):
    return x @ beta


def draw(head, key=0):
    return head.sample(jax.random.key(key), linear(BETA, X))


# --- Closed forms of generalized linear models -------------------------------------------------

VARIANCES = {  # of the score in z = x.beta
    "linear": (fvp.Gaussian(scale=0.7), lambda z: jnp.full_like(z, 0.7**-2)),
    "logistic": (fvp.Sigmoid(), lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)),
    "poisson": (fvp.Poisson(), jnp.exp),
}
every_model = pytest.mark.parametrize("name", VARIANCES)
weighted = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])


def closed_form(name, weights, kind):
    head, variance = VARIANCES[name]
    w = jnp.ones(40) if weights is None else weights
    z = linear(BETA, X)[:, 0]
    inverse = jnp.linalg.inv(X.T @ ((w * variance(z))[:, None] * X))
    if kind != "sandwich":
        return inverse
    scores = w[:, None] * head.score(z[:, None], draw(head)) * X
    return inverse @ scores.T @ scores @ inverse


@pytest.mark.each_value
@every_model
@weighted
@pytest.mark.parametrize("kind", ["expected", "observed", "sandwich"])
def test_covariance_equals_the_closed_form(name, weights, kind):
    head, _ = VARIANCES[name]
    problem, options = (linear, head, BETA, X, draw(head)), {"weights": weights, "kind": kind}
    expected = closed_form(name, weights, kind)
    covariance = fvp.parameter_covariance(*problem, **options)
    assert relative_error(covariance, expected) < 1e-12
    errors = fvp.standard_errors(*problem, **options)
    assert errors.shape == BETA.shape
    np.testing.assert_allclose(errors[:, 0], jnp.sqrt(jnp.diagonal(expected)), rtol=1e-11)
    in_chunks = fvp.parameter_covariance(*problem, **options, chunk_size=16)
    assert relative_error(in_chunks, covariance) < 1e-12


def test_expected_and_observed_information_differ_where_z_is_not_natural():
    head = fvp.StudentT(3.0)
    y = draw(head)
    r = (y - linear(BETA, X))[:, 0]
    hessian = 4 * (3 - r**2) / (3 + r**2) ** 2
    problem = (linear, head, BETA, X, y)
    expected = jnp.linalg.inv(X.T @ X * 4 / 6)
    observed = jnp.linalg.inv(X.T @ (hessian[:, None] * X))
    assert relative_error(fvp.parameter_covariance(*problem), expected) < 1e-12
    actual = fvp.parameter_covariance(*problem, kind="observed")
    assert relative_error(actual, observed) < 1e-12


def test_errors_are_a_tree_like_the_parameters():
    params = {"w": BETA[1:], "none": None, "b": BETA[0].astype(jnp.float32)}
    model = lambda p, x: x @ p["w"] + p["b"]
    errors = fvp.standard_errors(model, fvp.Sigmoid(), params, X[:, 1:])
    assert jax.tree.structure(errors) == jax.tree.structure(params)
    assert errors["b"].dtype == jnp.float32
    expected = jnp.sqrt(jnp.diagonal(closed_form("logistic", None, "expected")))
    np.testing.assert_allclose(errors["w"][:, 0], expected[1:], rtol=1e-6)
    np.testing.assert_allclose(errors["b"], expected[:1], rtol=1e-6)


# --- Where there is no inverse -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("units", [1.0, 1e6])
def test_parameters_of_the_null_directions_are_named(dtype, units):
    x = X.at[:, 2].set(units * (2 * X[:, 1] - X[:, 0])).astype(dtype)
    x = jnp.concatenate([x, jnp.asarray(RNG.normal(size=(40, 1)), dtype)], axis=1)
    params = {"slopes": jnp.zeros((4, 1), dtype), "unused": jnp.zeros((), dtype)}
    model = lambda p, x: x @ p["slopes"]
    with pytest.raises(ValueError, match="singular, with 2 null directions") as caught:
        fvp.standard_errors(model, fvp.Gaussian(), params, x)
    message = str(caught.value)
    for i, named in enumerate([True, True, True, False]):
        assert (f"params['slopes'][{i}, 0]" in message) is named
    assert "params['unused']" in message
    with pytest.raises(ValueError, match="singular, with 1 null direction, of "):
        fvp.standard_errors(model, fvp.Gaussian(), {"slopes": params["slopes"]}, x)


def test_badly_scaled_parameters_are_not_singular():
    scales = jnp.asarray([1e-6, 1.0, 1e6])
    covariance = fvp.parameter_covariance(linear, fvp.Gaussian(), BETA, X * scales)
    expected = fvp.parameter_covariance(linear, fvp.Gaussian(), BETA, X) / jnp.outer(scales, scales)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9)


def test_negative_curvature_is_no_minimum():
    y = linear(BETA, X) + 30
    with pytest.raises(ValueError, match=r"negative eigenvalues.*params\[1, 0\].*no minimum"):
        fvp.standard_errors(linear, fvp.StudentT(3.0), BETA, X, y, kind="observed")


def test_under_jit_a_singular_information_is_nan():
    errors = jax.jit(lambda x: fvp.standard_errors(linear, fvp.Gaussian(), BETA, x))
    assert jnp.isnan(errors(X.at[:, 1].set(1))).all()
    assert jnp.isfinite(errors(X)).all()


def test_kinds_and_targets_are_checked():
    problem = (linear, fvp.Sigmoid(), BETA, X)
    with pytest.raises(ValueError, match=r"kind: expected one of 'expected'.*got 'hc0'"):
        fvp.standard_errors(*problem, kind="hc0")
    with pytest.raises(ValueError, match="targets: kind='sandwich' expects the labels"):
        fvp.standard_errors(*problem, kind="sandwich")


# --- Coverage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "logistic", "poisson"])
def test_intervals_cover_the_truth_as_often_as_they_say(name):
    """2,000 data sets, fitted by Newton's method; 95% to within three standard errors."""
    head, _ = VARIANCES[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(400, 3))).at[:, 0].set(1)
    truth = jnp.asarray([[0.2], [-0.4], [0.3]])

    def covered(key):
        y = head.sample(key, linear(truth, x))

        def newton(beta, _):
            residual = head.score(linear(beta, x), y)
            covariance = fvp.parameter_covariance(linear, head, beta, x)
            return beta + covariance @ (x.T @ residual), None

        beta, _ = jax.lax.scan(newton, jnp.zeros((3, 1)), length=6)
        errors = fvp.standard_errors(linear, head, beta, x)
        lower, upper = fvp.confidence_intervals(beta, errors)
        return (lower < truth) & (truth < upper)

    run = quick_jit(jax.vmap(covered))
    rate = jnp.mean(run(jax.random.split(jax.random.key(0), 2000)), axis=0)
    np.testing.assert_allclose(rate, 0.95, atol=0.015)


# --- The KL divergence of two models -------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "gaussian-precision", "poisson"])
@pytest.mark.parametrize("batch_axes", [(6,), (2, 3)], ids=["B", "BT"])
def test_kl_divergence_equals_its_definition(name, batch_axes):
    case, rng = CASES[name], np.random.default_rng(0)
    model, params = mlp(case.event_shape), parameters(rng, case.size)
    new = jax.tree.map(lambda p: p + 0.3, params)
    x = jnp.asarray(rng.normal(size=(*batch_axes, 2)))
    w = jnp.asarray(rng.uniform(size=batch_axes))
    rows = [model(p, x).reshape(-1, case.size) for p in (params, new)]
    each = jax.vmap(case.kl)(*rows)
    actual = fvp.kl_divergence(model, case.head, params, new, x, weights=w)
    np.testing.assert_allclose(actual, jnp.sum(w.ravel() * each) / w.sum(), rtol=1e-12)
    actual = fvp.kl_divergence(model, case.head, params, new, x)
    np.testing.assert_allclose(actual, jnp.mean(each), rtol=1e-12)


def test_kl_divergence_is_half_the_quadratic_form_of_the_fisher():
    d = jnp.asarray([[1e-4], [2e-4], [-1e-4]])
    problem = fvp.Sigmoid(), BETA
    kl = fvp.kl_divergence(linear, *problem, BETA + d, X, weights=WEIGHTS)
    form = fvp.fisher(linear, *problem, X, weights=WEIGHTS).quadratic_form(d)
    np.testing.assert_allclose(kl, form / 2, rtol=1e-3)


def test_kl_divergence_does_not_see_rows_without_weight():
    x = X.at[3].set(jnp.nan)
    actual = fvp.kl_divergence(linear, fvp.Poisson(), BETA, BETA + 0.1, x, weights=WEIGHTS)
    expected = fvp.kl_divergence(linear, fvp.Poisson(), BETA, BETA + 0.1, X, weights=WEIGHTS)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


def test_kl_divergence_of_other_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"new_params: expected shape \(3, 1\)"):
        fvp.kl_divergence(linear, fvp.Sigmoid(), BETA, BETA[:2], X)


# --- Functions of the estimates ------------------------------------------------------------------

PARAMS = {"b": BETA[0], "w": BETA[1:]}


def model(params, x):
    return x[:, :1] * params["b"] + x[:, 1:] @ params["w"]


def ratios(params):
    return jnp.stack([params["w"][0, 0] / params["b"][0], params["w"].sum() ** 2])


@weighted
def test_the_delta_method_equals_its_formula_by_matrix_and_by_solves(weights):
    problem = (model, fvp.Poisson(), PARAMS, X)
    covariance = fvp.parameter_covariance(*problem, weights=weights)
    flat, unravel = ravel_pytree(PARAMS)
    gradient = jax.jacobian(lambda flat: ratios(unravel(flat)))(flat)
    expected = gradient @ covariance @ gradient.T
    F = fvp.fisher(*problem, weights=weights)
    for options in ({"covariance": covariance}, {"information": F, "tol": 1e-12}):
        estimate = fvp.delta_method(ratios, PARAMS, **options)
        assert relative_error(estimate.covariance, expected) < 1e-10
        np.testing.assert_allclose(estimate.standard_error, jnp.sqrt(jnp.diagonal(expected)))
        np.testing.assert_array_equal(estimate.value, ratios(PARAMS))
    scalar = fvp.delta_method(lambda p: ratios(p)[0], PARAMS, information=F)
    assert scalar.value.shape == scalar.standard_error.shape == ()
    np.testing.assert_allclose(scalar.standard_error, jnp.sqrt(expected[0, 0]), rtol=1e-6)


def test_the_delta_method_of_the_parameters_are_their_standard_errors():
    problem = (linear, fvp.Sigmoid(), BETA, X)
    estimate = fvp.delta_method(lambda b: b, BETA, information=fvp.fisher(*problem), tol=1e-12)
    np.testing.assert_allclose(estimate.standard_error, fvp.standard_errors(*problem), rtol=1e-8)


def test_the_delta_method_by_solves_forms_no_matrix_of_the_parameters():
    size = 3000
    F = fvp.fisher(lambda w, x: x * w, fvp.Gaussian(), jnp.ones(size), jnp.ones((2, size)))
    run = lambda F: fvp.delta_method(jnp.sum, jnp.ones(size), information=F).standard_error
    sizes = [v.aval.size for eqn in jax.make_jaxpr(run)(F).eqns for v in eqn.outvars]
    assert max(sizes) < size**2 / 100
    np.testing.assert_allclose(run(F), np.sqrt(size / 2), rtol=1e-6)


def test_the_delta_method_says_what_it_expects():
    F = fvp.fisher(linear, fvp.Gaussian(), BETA, X)
    for options in ({}, {"covariance": jnp.eye(3), "information": F}):
        with pytest.raises(ValueError, match="covariance, information"):
            fvp.delta_method(jnp.sum, BETA, **options)
    with pytest.raises(ValueError, match=r"covariance: expected shape \(3, 3\)"):
        fvp.delta_method(jnp.sum, BETA, jnp.eye(2))
    with pytest.raises(TypeError, match="information: expected an operator"):
        fvp.delta_method(jnp.sum, BETA, information=jnp.eye(3))
    with pytest.raises(TypeError, match="function: expected one floating-point array"):
        fvp.delta_method(lambda b: (b, b), BETA, jnp.eye(3))
    with pytest.raises(ValueError, match="did not converge"):
        fvp.delta_method(jnp.sum, BETA, information=F, maxiter=1, tol=1e-10)


# --- Intervals and tables ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_intervals_are_those_of_the_normal_distribution(level):
    lower, upper = fvp.confidence_intervals(
        PARAMS, jax.tree.map(jnp.ones_like, PARAMS), level=level
    )
    quantile = scipy.stats.norm.interval(level)[1]
    for ends, sign in ((lower, -1), (upper, 1)):
        expected = jax.tree.map(lambda p, sign=sign: p + sign * quantile, PARAMS)
        assert relative_error(ends, expected) < 1e-12


def test_a_level_that_is_no_probability_is_an_error():
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        fvp.confidence_intervals(BETA, BETA, level=95)


def test_the_table_has_a_row_for_each_number():
    errors = jax.tree.map(lambda p: jnp.full_like(p, 0.25), PARAMS)
    table = fvp.summary(PARAMS, errors)
    assert table.names == ("params['b'][0]", "params['w'][0, 0]", "params['w'][1, 0]")
    flat = ravel_pytree(PARAMS)[0]
    np.testing.assert_allclose(table.z, flat / 0.25)
    np.testing.assert_allclose(table.p_values, 2 * scipy.stats.norm.sf(abs(flat / 0.25)))
    lines = str(table).splitlines()
    assert lines[0].split() == ["coef", "std", "err", "z", "P>|z|", "[0.025", "0.975]"]
    assert lines[2].split()[1:3] == ["0.3000", "0.250"]
    assert len({len(line) for line in lines}) == 1
    assert "[0.05" in str(fvp.summary(PARAMS, errors, level=0.9))


# --- Elastic weight consolidation ----------------------------------------------------------------


def test_the_penalty_of_the_diagonal_is_the_quadratic_model_of_the_old_loss():
    importance = fvp.fisher_diagonal(model, fvp.Poisson(), PARAMS, X)
    moved = jax.tree.map(lambda p: p + 0.1, PARAMS)
    expected = 0.5 * 3 * sum(0.01 * leaf.sum() for leaf in jax.tree.leaves(importance))
    penalty = lambda p: fvp.ewc_penalty(p, PARAMS, importance, 3.0)
    np.testing.assert_allclose(penalty(moved), expected, rtol=1e-12)
    gradient = jax.grad(penalty)(moved)
    assert relative_error(gradient, jax.tree.map(lambda f: 0.3 * f, importance)) < 1e-12
    assert penalty(PARAMS) == 0


def test_the_penalty_is_summed_in_float32():
    ones = jnp.ones(5000, jnp.float16)
    penalty = fvp.ewc_penalty(3 * ones, ones, ones, 10.0)
    assert penalty.dtype == jnp.float32
    assert penalty == 100_000


@pytest.mark.parametrize("name", ["anchor", "importance"])
def test_a_penalty_of_other_shapes_is_an_error(name):
    arguments = {"params": BETA, "anchor": BETA, "importance": BETA} | {name: BETA[:2]}
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(3, 1\)"):
        fvp.ewc_penalty(**arguments)
