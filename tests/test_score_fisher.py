"""Fisher matrices of densities, and score matching, against dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import product_matrix, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 4))), "v": jnp.asarray(RNG.normal(size=(4, 2)))}
SAMPLES = jnp.asarray(RNG.normal(size=(8, 3)))
WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2.0, size=8)).at[2].set(0)
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def real(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"][:, 0]


def complex_(params, x):
    """Log psi of a wave function with real parameters."""
    amplitude, phase = jnp.tanh(x @ params["w"]) @ params["v"]
    return amplitude + 1j * phase


def dense_covariance(log_prob, weights, centered):
    values = lambda flat: jax.vmap(lambda x: log_prob(UNRAVEL(flat), x))(SAMPLES)
    scores = jax.jacobian(lambda flat: values(flat).real)(FLAT) + 0j
    if jnp.iscomplexobj(values(FLAT)):
        scores += 1j * jax.jacobian(lambda flat: values(flat).imag)(FLAT)
    p = jnp.ones(8) / 8 if weights is None else weights / weights.sum()
    if centered:
        scores = scores - p @ scores
    return (scores.conj().T @ (p[:, None] * scores)).real


every_density = pytest.mark.parametrize("log_prob", [real, complex_])
every_kind = pytest.mark.parametrize(
    ("weights", "centered"),
    [(None, True), (WEIGHTS, True), (None, False), (WEIGHTS, False)],
    ids=["centred", "weighted", "second moment", "weighted second moment"],
)


@every_density
@every_kind
def test_score_fisher_is_the_covariance_of_the_scores(log_prob, weights, centered):
    S = fvp.score_fisher(log_prob, PARAMS, SAMPLES, weights=weights, centered=centered)
    expected = dense_covariance(log_prob, weights, centered)
    assert relative_error(product_matrix(S), expected) < 1e-12
    assert relative_error(S.dense(), expected) < 1e-12


@every_density
@every_kind
def test_score_fisher_can_be_solved_with(log_prob, weights, centered):
    S = fvp.score_fisher(log_prob, PARAMS, SAMPLES, weights=weights, centered=centered)
    damped = dense_covariance(log_prob, weights, centered) + 1e-2 * jnp.eye(FLAT.size)
    expected = UNRAVEL(jnp.linalg.solve(damped, FLAT))
    assert relative_error(fvp.solve_dual(S, PARAMS, 1e-2), expected) < 1e-10
    solution, info = fvp.cg(S, PARAMS, damping=1e-2, tol=1e-12)
    assert info.converged
    assert relative_error(solution, expected) < 1e-8


@pytest.mark.each_value
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", ["solve_dual", "dense"])
def test_centred_scores_cost_little_more_than_their_second_moment(make, weighted):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (10, 20)), "v": jax.random.normal(keys[1], (20, 2))}
    samples = jax.random.normal(keys[2], (64, 10))
    weights = jnp.linspace(0, 2, 64) if weighted else None
    use = {
        "solve_dual": lambda S: fvp.solve_dual(S, params, 0.1),
        "dense": lambda S: S.dense(),
    }[make]

    def flops(centered):
        build = lambda p: fvp.score_fisher(real, p, samples, weights=weights, centered=centered)
        return jax.jit(lambda p: use(build(p))).lower(params).compile().cost_analysis()["flops"]

    assert flops(centered=True) < 1.2 * flops(centered=False)


def test_scores_without_a_layer_are_centred():
    """Each parameter multiplies one feature, and is summed over."""
    log_prob = lambda p, x: jnp.sum(jnp.sin(p["w"][:, 0] * x) * jnp.cumsum(p["w"][:, 1] * x))
    S = fvp.score_fisher(log_prob, PARAMS, SAMPLES, weights=WEIGHTS)
    damped = dense_covariance(log_prob, WEIGHTS, centered=True) + 1e-2 * jnp.eye(FLAT.size)
    expected = UNRAVEL(jnp.linalg.solve(damped, FLAT))
    assert relative_error(fvp.solve_dual(S, PARAMS, 1e-2), expected) < 1e-10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_mean_far_above_the_deviations_costs_no_more_than_its_digits(dtype):
    level = 300.0  # of the mean score over its deviation
    log_prob = lambda p, x: real(p, x) + level * jnp.sum(p["w"])
    params, samples = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, SAMPLES))
    S = fvp.score_fisher(log_prob, params, samples)
    damped = dense_covariance(real, None, centered=True) + 1e-1 * jnp.eye(FLAT.size)
    expected = UNRAVEL(jnp.linalg.solve(damped, FLAT))
    bound = 100 * level * float(jnp.finfo(dtype).eps)
    assert relative_error(fvp.solve_dual(S, params, 1e-1), expected) < bound


def test_a_normalisation_drops_out_of_centred_scores():
    unnormalised = lambda p, x: real(p, x) + jnp.sum(p["w"] ** 3)
    actual = fvp.score_fisher(unnormalised, PARAMS, SAMPLES) @ PARAMS
    assert relative_error(actual, fvp.score_fisher(real, PARAMS, SAMPLES) @ PARAMS) < 1e-12


def test_score_fisher_of_a_sample_without_weight_is_that_of_the_others():
    samples = SAMPLES.at[2].set(jnp.nan)
    actual = fvp.score_fisher(real, PARAMS, samples, weights=WEIGHTS) @ PARAMS
    expected = fvp.score_fisher(real, PARAMS, SAMPLES, weights=WEIGHTS) @ PARAMS
    assert relative_error(actual, expected) < 1e-12


def test_score_fisher_compiles_once_for_one_function():
    calls = []

    def counted(params, x):
        calls.append(None)
        return real(params, x)

    for _ in range(3):
        fvp.score_fisher(counted, PARAMS, SAMPLES)
    once = len(calls)
    fvp.score_fisher(counted, PARAMS, SAMPLES + 1)
    assert len(calls) == once


def test_samples_may_be_trees():
    pairs = {"x": SAMPLES, "shift": SAMPLES[:, 0]}
    log_prob = lambda p, s: real(p, s["x"] + s["shift"])
    actual = fvp.score_fisher(log_prob, PARAMS, pairs) @ PARAMS
    expected = fvp.score_fisher(real, PARAMS, SAMPLES + SAMPLES[:, :1]) @ PARAMS
    assert relative_error(actual, expected) < 1e-12


def test_score_fisher_says_what_it_expects():
    with pytest.raises(ValueError, match=r"log_prob: expected a scalar .* got shape \(4,\)"):
        fvp.score_fisher(lambda p, x: x @ p["w"], PARAMS, SAMPLES)
    with pytest.raises(TypeError, match="log_prob: expected log_prob"):
        fvp.score_fisher(1.0, PARAMS, SAMPLES)
    with pytest.raises(TypeError, match=r"params\['k'\]: expected a floating-point"):
        fvp.score_fisher(real, {"k": jnp.arange(3)}, SAMPLES)


# --- Fisher of a density --------------------------------------------------------------------------


def test_density_fisher_of_a_normal_distribution():
    """diag(1 / scale^2, 2) for the mean and the log of the scale; z-scores below 5."""
    params, count = {"mean": jnp.asarray(0.7), "log_scale": jnp.asarray(0.4)}, 100_000

    def log_prob(p, x):
        r = (x - p["mean"]) * jnp.exp(-p["log_scale"])
        return -0.5 * r**2 - p["log_scale"] - 0.5 * jnp.log(2 * jnp.pi)

    def sample(p, key):
        return p["mean"] + jnp.exp(p["log_scale"]) * jax.random.normal(key)

    F = fvp.density_fisher(log_prob, sample, params, jax.random.key(0), count)
    expected = np.diag([2.0, np.exp(-0.8)])  # log_scale comes first
    # Standard deviations of (r^2 - 1)^2, r (r^2 - 1) and r^2, r ~ N(0, 1), by its moments.
    precision = np.exp(-0.4)
    mixed = np.sqrt(10) * precision
    deviation = np.array([[np.sqrt(56), mixed], [mixed, np.sqrt(2) * precision**2]])
    assert (np.abs(F.dense() - expected) / deviation * np.sqrt(count)).max() < 5
    assert F.output.shape == (count, 1)


def test_the_fisher_of_a_joint_density_is_marginal_and_mean_conditional():
    """Of p(x) p(y given x): the mean of their cross terms is zero; z-scores below 5."""
    params, count = {"mean": jnp.asarray(0.3), "slope": jnp.asarray(0.7)}, 100_000
    noise = jax.random.normal(jax.random.key(0), (2, count))
    x = params["mean"] + noise[0]
    location = lambda p, x: p["mean"] + p["slope"] * x
    samples = {"x": x, "y": location(params, x) + noise[1]}
    marginal = lambda p, s: -0.5 * (s["x"] - p["mean"]) ** 2
    conditional = lambda p, s: -0.5 * (s["y"] - location(p, s["x"])) ** 2
    joint = lambda p, s: marginal(p, s) + conditional(p, s)
    F = fvp.score_fisher(joint, params, samples, centered=False).dense()
    scores = jax.vmap(jax.grad(joint), (None, 0))(params, samples)
    scores = np.stack([scores["mean"], scores["slope"]], axis=1)
    deviation = np.einsum("ni,nj->nij", scores, scores).std(0) / np.sqrt(count)
    first = fvp.score_fisher(marginal, params, samples, centered=False).dense()
    # The conditional Fisher needs no labels: its expectation over y is in closed form.
    rest = fvp.fisher(location, fvp.Gaussian(event_ndim=0), params, x).dense()
    assert (np.abs(F - (first + rest)) / deviation).max() < 5
    expected = np.array([[2.0, 0.3], [0.3, 1.09]])
    assert (np.abs(F - expected) / deviation).max() < 5


def test_density_fisher_does_not_differentiate_its_samples():
    sample = lambda w, key: w + jax.random.normal(key)
    log_prob = lambda w, x: -0.5 * (x - w) ** 2
    build = lambda w: fvp.density_fisher(log_prob, sample, w, jax.random.key(0), 100).dense()
    assert build(jnp.asarray(0.3)) > 0.5


# --- Score matching -------------------------------------------------------------------------------

POINTS = jnp.asarray(RNG.normal(size=(6, 3)))
PRECISION = jnp.asarray([[2.0, 0.6, -0.3], [0.6, 1.5, 0.4], [-0.3, 0.4, 0.9]])


def score_network(params, x):
    return jnp.tanh(x @ params) @ params.T


def dense_divergence(score_fn, x):
    one = lambda x: score_fn(x[None])[0]
    each = lambda x: 0.5 * jnp.sum(one(x) ** 2) + jnp.trace(jax.jacobian(one)(x))
    return jnp.mean(jax.vmap(each)(x))


def test_the_exact_divergence_equals_the_trace_of_the_jacobian():
    value, gradient = jax.value_and_grad(
        lambda w: fvp.fisher_divergence(lambda x: score_network(w, x), POINTS)
    )(PARAMS["w"])
    expected, slope = jax.value_and_grad(
        lambda w: dense_divergence(lambda x: score_network(w, x), POINTS)
    )(PARAMS["w"])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-10)


def test_the_sliced_divergence_is_unbiased():
    score_fn = lambda x: score_network(PARAMS["w"], x)
    draws = jax.vmap(lambda key: fvp.fisher_divergence(score_fn, POINTS, key))
    values = np.asarray(quick_jit(draws)(jax.random.split(jax.random.key(0), 20_000)))
    exact = fvp.fisher_divergence(score_fn, POINTS)
    assert abs(values.mean() - exact) / values.std() * np.sqrt(20_000) < 5
    many = draws(jax.random.split(jax.random.key(1), 2))
    more = fvp.fisher_divergence(score_fn, POINTS, jax.random.key(1), num_slices=2000)
    assert abs(more - exact) < abs(many - exact).max()


def test_the_divergence_is_least_at_the_score_of_the_density():
    """Over linear scores -P x it is least at the inverse of the second moment of the data."""
    moment = POINTS.T @ POINTS / 6
    loss = lambda P: fvp.fisher_divergence(lambda x: -x @ P, POINTS)
    best = jnp.linalg.inv(moment)
    assert jnp.abs(jax.grad(loss)(best)).max() < 1e-10
    assert loss(best) < loss(PRECISION)


def test_the_divergence_says_what_it_expects():
    with pytest.raises(ValueError, match=r"x: expected samples of shape \(N, D\), got \(3,\)"):
        fvp.fisher_divergence(lambda x: x, POINTS[0])
    with pytest.raises(ValueError, match=r"score_fn: expected one score for each sample"):
        fvp.fisher_divergence(lambda x: x[:, :1], POINTS)
    with pytest.raises(TypeError, match="x: expected floating-point samples"):
        fvp.fisher_divergence(lambda x: x, jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="num_slices: expected 1 or more"):
        fvp.fisher_divergence(lambda x: x, POINTS, jax.random.key(0), num_slices=0)
