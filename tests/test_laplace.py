"""Posteriors beside Bayesian linear regression, dense precisions, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, quick_jit, reference, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

KEY, SCALE = jax.random.key(0), 0.7
STRUCTURES = ("dense", "kfac", "ekfac", "diagonal", "last_layer", "low_rank")
RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(9, 3))), jnp.asarray(RNG.normal(size=(9, 2)))
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))}
TREE = {"w": 0.7, "b": 3.0}

every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def linear(params, x):
    return x @ params["w"] + params["b"]


def regression(structure="dense", **options):
    return fvp.laplace(linear, fvp.Gaussian(scale=SCALE), PARAMS, X, structure=structure, **options)


def design(x):
    """Rows of the Jacobian (example, output) in the order of ``ravel_pytree``: b, then w."""
    rows = [np.concatenate([np.eye(2)[k], np.kron(row, np.eye(2)[k])]) for row in x for k in (0, 1)]
    return np.stack(rows)


def diagonal_of(prior):
    prior = {"w": prior, "b": prior} if isinstance(prior, float) else prior
    return np.r_[np.full(2, prior["b"]), np.full(6, prior["w"])]


# --- Bayesian linear regression ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "prior"),
    [("dense", 0.7), ("dense", TREE), ("kfac", TREE), ("last_layer", TREE), ("low_rank", 0.7)],
    ids=str,
)
def test_linear_regression_in_closed_form(structure, prior):
    """Known noise, prior N(0, D^-1): the weights are normal, and the evidence is of y itself."""
    weights = np.linspace(0.5, 2, 9)
    A, D = design(X), np.diag(diagonal_of(prior))
    per_row = np.repeat(weights, 2) / SCALE**2
    covariance = np.linalg.inv(A.T @ (per_row[:, None] * A) + D)
    mean = covariance @ A.T @ (per_row * np.ravel(Y))
    params = ravel_pytree(PARAMS)[1](jnp.asarray(mean))
    posterior = fvp.laplace(
        linear,
        fvp.Gaussian(scale=SCALE),
        params,
        X,
        structure=structure,
        prior_precision=prior,
        weights=weights,
    )
    assert relative_error(posterior.mean, params) == 0
    np.testing.assert_allclose(
        ravel_pytree(posterior.variance())[0], np.diag(covariance), rtol=1e-8
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    expected = design(x) @ covariance @ design(x).T
    z, predicted = posterior.predictive(x, full_covariance=True)
    np.testing.assert_allclose(z, linear(params, x), rtol=1e-12)
    for i in range(4):
        block = slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(predicted[i], expected[block, block], rtol=1e-8, atol=1e-12)
    variance = posterior.predictive(x)[1]
    np.testing.assert_allclose(np.ravel(variance), np.diag(expected), rtol=1e-8)


@pytest.mark.parametrize(
    ("structure", "prior"),
    [("dense", 0.7), ("dense", TREE), ("kfac", TREE), ("last_layer", TREE), ("low_rank", 0.7)],
    ids=str,
)
def test_evidence_of_linear_regression(structure, prior):
    """Log N(y; 0, A D^-1 A^T + scale^2 I), at the mean of the posterior."""
    A, D = design(X), np.diag(diagonal_of(prior))
    precision = A.T @ A / SCALE**2 + D
    mean = np.linalg.solve(precision, A.T @ np.ravel(Y)) / SCALE**2
    params = ravel_pytree(PARAMS)[1](jnp.asarray(mean))
    head = fvp.Gaussian(scale=SCALE)
    posterior = fvp.laplace(linear, head, params, X, structure=structure, prior_precision=prior)
    marginal = A @ np.linalg.inv(D) @ A.T + SCALE**2 * np.eye(18)
    y = np.ravel(Y)
    expected = -0.5 * (
        y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1]
    )
    np.testing.assert_allclose(posterior.log_evidence(Y), expected, rtol=1e-8)


# --- Structures beside dense matrices ---------------------------------------------------------


CASE, MODEL = CASES["softmax"], mlp((3,))
NETWORK, INPUTS = parameters(RNG, 3), jnp.asarray(RNG.normal(size=(6, 2)))
WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2, size=6))
LABELS = CASE.targets(RNG, (6,))


def network(structure, **options):
    options = {"weights": WEIGHTS, "prior_precision": 0.5, **options}
    return fvp.laplace(MODEL, CASE.head, NETWORK, INPUTS, structure=structure, **options)


def dense_curvature(structure):
    """The (P, P) matrix that the structure stands for."""
    F = reference(CASE, MODEL, NETWORK, INPUTS, LABELS, WEIGHTS)["fisher"] * WEIGHTS.sum()
    if structure == "diagonal":
        return jnp.diag(jnp.diag(F))
    if structure in ("kfac", "ekfac"):
        K = fvp.kfac(
            MODEL,
            CASE.head,
            NETWORK,
            INPUTS,
            weights=WEIGHTS,
            eigenvalue_corrected=structure == "ekfac",
        )
        return K.dense() * WEIGHTS.sum()
    if structure == "low_rank":
        values, vectors = jnp.linalg.eigh(F)
        return (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    return F


@pytest.mark.parametrize(
    ("structure", "prior"),
    # A prior for each leaf would turn the bases of "ekfac": it is refused.
    [(s, "number" if s == "ekfac" else "tree") for s in STRUCTURES if s != "last_layer"],
)
def test_structures_of_a_network(structure, prior):
    flat, unravel = ravel_pytree(NETWORK)
    tree = jax.tree.map(lambda x: 0.3 + x.size / 10, NETWORK)
    spread = jax.tree.map(lambda d, x: jnp.full(x.shape, d), tree, NETWORK)
    D = ravel_pytree(spread)[0] if prior == "tree" else jnp.full(flat.size, 0.5)
    posterior = network(structure, prior_precision=tree if prior == "tree" else 0.5, rank=4)
    precision = dense_curvature(structure) + jnp.diag(D)
    covariance = jnp.linalg.inv(precision)
    np.testing.assert_allclose(
        ravel_pytree(posterior.variance())[0], jnp.diag(covariance), rtol=1e-8
    )
    jacobian = jax.jacobian(lambda flat: MODEL(unravel(flat), INPUTS))(flat)
    expected = jnp.einsum("ncp,pq,ndq->ncd", jacobian, covariance, jacobian)
    _, predicted = posterior.predictive(INPUTS, full_covariance=True)
    np.testing.assert_allclose(predicted, expected, rtol=1e-7, atol=1e-10)
    nll = jnp.sum(WEIGHTS * CASE.head.nll(MODEL(NETWORK, INPUTS), LABELS))
    ratio = jnp.linalg.slogdet(precision)[1] - jnp.sum(jnp.log(D))
    evidence = -nll - 0.5 * jnp.sum(D * flat**2) - 0.5 * ratio
    np.testing.assert_allclose(posterior.log_evidence(LABELS), evidence, rtol=1e-9)


@pytest.mark.parametrize("marked", [False, True])
def test_last_layer_is_the_dense_posterior_of_its_parameters(marked):
    mask = {"hidden": {"w": False, "b": False}, "out": {"w": True, "b": True}}
    posterior = network("last_layer", last_layer=mask if marked else None)
    features = jnp.tanh(INPUTS @ NETWORK["hidden"]["w"] + NETWORK["hidden"]["b"])
    affine = lambda p, x: x @ p["w"] + p["b"]
    options = {"weights": WEIGHTS, "prior_precision": 0.5, "structure": "dense"}
    alone = fvp.laplace(affine, CASE.head, NETWORK["out"], features, **options)
    variance = posterior.variance()
    assert relative_error(variance["out"], alone.variance()) < 1e-10
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(variance["hidden"]))
    pairs = zip(posterior.predictive(INPUTS), alone.predictive(features), strict=True)
    assert all(relative_error(a, b) < 1e-10 for a, b in pairs)
    np.testing.assert_allclose(posterior.log_evidence(LABELS), alone.log_evidence(LABELS))
    samples = posterior.sample(KEY, 3)
    assert np.all(samples["hidden"]["w"] == NETWORK["hidden"]["w"])
    assert samples["hidden"]["w"].shape == (3, 2, 3)
    assert np.all(np.std(samples["out"]["w"], axis=0) > 0)


def test_last_layer_of_several_is_found():
    params = [jnp.eye(2), jnp.eye(2), jnp.ones((2, 3))]
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[2]
    posterior = fvp.laplace(model, CASE.head, params, INPUTS, structure="last_layer")
    assert [bool(np.any(leaf > 0)) for leaf in posterior.variance()] == [False, False, True]


def test_all_tokens_of_an_example_count():
    """Outputs (B, T, C): a covariance for each token, and B T terms of the loss."""
    x = INPUTS.reshape(3, 2, 2)
    posterior = fvp.laplace(MODEL, CASE.head, NETWORK, x, structure="dense")
    flat = fvp.laplace(MODEL, CASE.head, NETWORK, INPUTS, structure="dense")
    _, actual = posterior.predictive(x, full_covariance=True)
    _, expected = flat.predictive(INPUTS, full_covariance=True)
    np.testing.assert_allclose(actual.reshape(6, 3, 3), expected, rtol=1e-9)


def test_a_parameter_that_is_not_read_keeps_its_prior():
    params = {**PARAMS, "unread": jnp.ones(3)}
    for structure in STRUCTURES:
        posterior = fvp.laplace(
            linear, fvp.Gaussian(), params, X, structure=structure, prior_precision=4.0
        )
        expected = 0 if structure == "last_layer" else 0.25
        np.testing.assert_allclose(posterior.variance()["unread"], expected, rtol=1e-12)


def test_examples_without_weight_do_not_count():
    for structure in STRUCTURES:
        weights = jnp.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0])
        x = X.at[4:].set(jnp.nan)
        few = fvp.laplace(linear, fvp.Gaussian(), PARAMS, X[:4], structure=structure)
        masked = fvp.laplace(
            linear, fvp.Gaussian(), PARAMS, x, structure=structure, weights=weights
        )
        assert relative_error(masked.variance(), few.variance()) < 1e-10
        np.testing.assert_allclose(masked.log_evidence(Y), few.log_evidence(Y[:4]), rtol=1e-12)
        nothing = fvp.laplace(
            linear, fvp.Gaussian(), PARAMS, X, structure=structure, weights=0 * weights
        )
        np.testing.assert_allclose(nothing.variance()["w"], 1, rtol=1e-12)


# --- Samples, probabilities, evidence ---------------------------------------------------------


@every_structure
def test_samples_have_the_mean_and_the_covariance(structure):
    """4000 draws; z-scores of the mean and of all second moments, the bound fixed beforehand."""
    posterior = network(structure, rank=4)
    draws = jax.vmap(lambda p: ravel_pytree(p)[0])(posterior.sample(KEY, 4000))
    deviations = np.asarray(draws - ravel_pytree(NETWORK)[0])
    numbers = slice(-12, None) if structure == "last_layer" else slice(None)
    deviations = deviations[:, numbers]
    precision = dense_curvature(structure) + 0.5 * jnp.eye(21)
    covariance = np.linalg.inv(precision[numbers, numbers])
    scale = np.sqrt(np.diag(covariance))
    assert np.abs(deviations.mean(0) / scale * np.sqrt(4000)).max() < 4.5
    error = deviations.T @ deviations / 4000 - covariance
    spread = np.sqrt((np.outer(scale, scale) ** 2 + covariance**2) / 4000)
    assert np.abs(error / spread).max() < 5


def test_samples_are_like_the_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    posterior = fvp.laplace(linear, fvp.Gaussian(), params, X.astype(jnp.bfloat16))
    samples = posterior.sample(KEY, 4)
    assert jax.tree.structure(samples) == jax.tree.structure(params)
    assert samples["w"].shape == (4, 3, 2)
    assert samples["w"].dtype == jnp.bfloat16
    assert posterior.variance()["w"].dtype == jnp.float32


def test_class_probabilities_are_means_over_samples_of_the_linearised_outputs():
    posterior = network("dense")
    z, covariance = posterior.predictive(INPUTS, full_covariance=True)
    probabilities = posterior.predictive_mean(INPUTS, KEY, num_samples=4000)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-10)
    draws = [
        np.random.default_rng(i).multivariate_normal(m, c, 4000)
        for i, (m, c) in enumerate(zip(z, covariance, strict=True))
    ]
    expected = jax.nn.softmax(jnp.stack(draws))
    error = expected.std(1) * np.sqrt(2 / 4000)
    assert np.max(np.abs(probabilities - expected.mean(1)) / error) < 4.5
    plain = jax.nn.softmax(z)
    entropy = lambda p: -jnp.sum(p * jnp.log(p), -1)
    assert entropy(probabilities).mean() > entropy(plain).mean()


@every_structure
def test_gradient_of_the_evidence(structure):
    posterior = network(structure, rank=4)
    evidence = lambda d: posterior.with_prior_precision(d).log_evidence(LABELS)
    step = 1e-5
    difference = (evidence(0.5 + step) - evidence(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(evidence))(0.5), difference, rtol=1e-6)


@pytest.mark.parametrize("structure", ["dense", "kfac"])
def test_gradient_of_the_evidence_in_a_precision_for_each_leaf(structure):
    posterior = network(structure, rank=4)
    tree = jax.tree.map(lambda x: 0.3 + x.size / 10, NETWORK)
    evidence = lambda tree: posterior.with_prior_precision(tree).log_evidence(LABELS)
    gradient, step = jax.grad(evidence)(tree), 1e-5
    for number, actual in enumerate(jax.tree.leaves(gradient)):
        leaves, structure = jax.tree.flatten(tree)
        unit = np.eye(len(leaves))[number]
        up, down = (
            evidence(jax.tree.unflatten(structure, list(leaves + sign * step * unit)))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(actual, (up - down) / (2 * step), rtol=1e-5)


@every_structure
def test_gradient_of_predicted_variances_in_the_prior_precision(structure):
    """Of a curvature with equal eigenvalues, many of them zero."""
    posterior = network(structure, rank=4)
    variance = lambda d: posterior.with_prior_precision(d).predictive(INPUTS)[1].sum()
    step = 1e-5
    difference = (variance(0.5 + step) - variance(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(variance)(0.5), difference, rtol=1e-6)


@every_structure
def test_another_prior_is_that_of_a_posterior_built_with_it(structure):
    changed = network(structure).with_prior_precision(3.0)
    assert (
        relative_error(changed.variance(), network(structure, prior_precision=3.0).variance()) == 0
    )


def test_everything_works_under_jit():
    @quick_jit
    def numbers(params, x, d):
        posterior = fvp.laplace(MODEL, CASE.head, params, x, prior_precision=d)
        return posterior, posterior.variance(), posterior.sample(KEY, 2), posterior.predictive(x)

    posterior, variance, samples, predicted = numbers(NETWORK, INPUTS, 0.5)
    expected = fvp.laplace(MODEL, CASE.head, NETWORK, INPUTS, prior_precision=0.5)
    for p in (posterior, expected):
        assert relative_error(variance, p.variance()) < 1e-12
        assert relative_error(samples, p.sample(KEY, 2)) < 1e-12
        assert relative_error(predicted, p.predictive(INPUTS)) < 1e-12


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "full"}, "structure: expected one of 'dense'"),
        ({"prior_precision": 0.0}, "prior_precision: expected a positive number"),
        ({"prior_precision": -1.0}, "prior_precision: expected a finite number of 0 or more"),
        ({"prior_precision": {"w": 1.0}}, "prior_precision: expected a number, or a tree"),
        ({"prior_precision": {"w": np.ones(2), "b": 1.0}}, r"prior_precision\['w'\]: expected one"),
        ({"prior_precision": TREE, "structure": "ekfac"}, "prior_precision: the eigenbases"),
        ({"weights": -np.ones(9)}, "weights: .* expect 0 or more"),
        ({"structure": "last_layer", "last_layer": {"w": True}}, "last_layer: expected a tree"),
        (
            {"structure": "last_layer", "last_layer": {"w": False, "b": False}},
            "last_layer: expected at least",
        ),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        regression(**options).variance()


def test_a_model_without_layer_rules_is_refused_unless_there_is_a_fallback():
    params = {"w": 0.3 * jnp.eye(3)}
    model = lambda p, x: jnp.tanh(x @ jnp.linalg.inv(jnp.eye(3) + p["w"]))
    with pytest.raises(ValueError, match="fallback"):
        fvp.laplace(model, fvp.Softmax(), params, X)
    posterior = fvp.laplace(model, fvp.Softmax(), params, X, fallback="per_example")
    diagonal = fvp.laplace(
        model, fvp.Softmax(), params, X, structure="diagonal", fallback="per_example"
    )
    assert relative_error(posterior.variance(), diagonal.variance()) < 1e-10
