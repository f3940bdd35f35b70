"""Every public name once, on a small problem: what the oldest supported versions must pass."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvp
from fvp.compatibility import BROKEN, warn_if_broken

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()
PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.zeros(2)}
X, Y, KEY = jnp.linspace(0, 1, 12).reshape(4, 3), jnp.array([0, 0, 1, 1]), jax.random.key(0)


def model(params, x):
    return x @ params["w"] + params["b"]


FISHER = fvp.fisher(model, HEAD, PARAMS, X)
GRADIENT = FISHER.value_and_grad(Y)[1]
PROBLEM = (model, HEAD, PARAMS, X)


def step(tx):
    return tx.update(GRADIENT, tx.init(PARAMS), PARAMS, batch=X, targets=Y)[0]


def solved_by(solver):
    return step(fvp.scale_by_fisher(model, HEAD, damping=0.1, solver=solver))


def damped_by(rule):
    return step(fvp.scale_by_fisher(model, HEAD, damping=rule))


def damped_state():
    tx = fvp.scale_by_fisher(model, HEAD, damping=0.1)
    return tx.update(GRADIENT, tx.init(PARAMS), PARAMS, batch=X)[1]


def curved_by(kind):
    return fvp.gauss_newton(kind, *PROBLEM, targets=Y) @ PARAMS


ERRORS = jax.tree.map(jnp.ones_like, PARAMS)
REGRESSION = (lambda w, x: x**2 @ w, fvp.Poisson(), jnp.ones((3, 1)), X)


def log_prob(params, x):
    return -0.5 * jnp.sum((x - params["w"].T - params["b"][:, None]) ** 2)


class Laplacian:
    event_shape = ()

    def __init__(self, location):
        self.location, self.batch_shape = location, location.shape

    def log_prob(self, y):
        return -abs(y - self.location) - jnp.log(2)


CALLS = {
    "Auto": lambda: solved_by(fvp.Auto()),
    "CG": lambda: solved_by(fvp.CG()),
    "Dense": lambda: solved_by(fvp.Dense()),
    "Dual": lambda: solved_by(fvp.Dual()),
    "EmpiricalCurvature": lambda: curved_by(fvp.EmpiricalCurvature),
    "ExponentialFamily": lambda: fvp.ExponentialFamily(jnp.sum, lambda y: y).nll(X, 2 * X),
    "FisherCurvature": lambda: curved_by(fvp.FisherCurvature),
    "FixedDamping": lambda: damped_by(fvp.FixedDamping(0.1)),
    "FromDistribution": lambda: fvp.FromDistribution(Laplacian).nll(X, 2 * X),
    "HessianCurvature": lambda: curved_by(fvp.HessianCurvature),
    "Jacobi": lambda: solved_by(fvp.CG(preconditioner=fvp.Jacobi())),
    "KFACSolver": lambda: solved_by(fvp.KFACSolver()),
    "LearnedScaleGaussian": lambda: fvp.LearnedScaleGaussian().nll(jnp.zeros((3, 2)), jnp.ones(3)),
    "LevenbergMarquardt": lambda: damped_by(fvp.LevenbergMarquardt()),
    "Multinomial": lambda: fvp.Multinomial(3).nll(X, jnp.full((4, 3), 1)),
    "Poisson": lambda: fvp.Poisson().nll(X, jnp.full((4, 3), 2)),
    "Product": lambda: fvp.Product({"a": fvp.Poisson()}).nll({"a": X}, {"a": X}),
    "ReductionRatio": lambda: damped_by(fvp.ReductionRatio()),
    "SampledCurvature": lambda: fvp.mc_fisher(*PROBLEM, KEY).linearized.curvature.scores,
    "TrueVersusRest": lambda: curved_by(fvp.TrueVersusRest),
    "stack_residuals": lambda: fvp.stack_residuals({"inside": X, "edge": X[0]}),
    "gauss_newton": lambda: curved_by(fvp.FisherCurvature),
    "gauss_newton_vector_product": lambda: fvp.gauss_newton_vector_product(
        fvp.FisherCurvature, *PROBLEM, PARAMS
    ),
    "Gaussian": lambda: fvp.Gaussian().nll(jnp.zeros((2, 1)), jnp.ones((2, 1))),
    "Sigmoid": lambda: fvp.Sigmoid().nll(jnp.zeros((2, 1)), jnp.ones((2, 1))),
    "Softmax": lambda: HEAD.nll(model(PARAMS, X), Y),
    "StudentT": lambda: fvp.StudentT(3.0).nll(X, 2 * X),
    "compare_curvatures": lambda: (
        fvp.compare_curvatures(FISHER, fvp.ggn(*PROBLEM, Y), GRADIENT, KEY, damping=0.1).cosine
    ),
    "confidence_intervals": lambda: fvp.confidence_intervals(PARAMS, ERRORS),
    "delta_method": lambda: fvp.delta_method(lambda p: p["w"].sum(), PARAMS, jnp.eye(8)),
    "density_fisher": lambda: (
        fvp.density_fisher(log_prob, lambda p, key: jax.random.normal(key, (3,)), PARAMS, KEY, 4)
        @ PARAMS
    ),
    "ewc_penalty": lambda: fvp.ewc_penalty(PARAMS, ERRORS, ERRORS),
    "fisher_divergence": lambda: fvp.fisher_divergence(lambda x: -x, X),
    "kl_divergence": lambda: fvp.kl_divergence(model, HEAD, PARAMS, GRADIENT, X),
    "parameter_covariance": lambda: fvp.parameter_covariance(*REGRESSION),
    "score_fisher": lambda: fvp.score_fisher(log_prob, PARAMS, X) @ PARAMS,
    "standard_errors": lambda: fvp.standard_errors(*REGRESSION),
    "summary": lambda: fvp.summary(PARAMS, ERRORS).p_values,
    "cg": lambda: fvp.cg(FISHER, GRADIENT, damping=0.1)[0],
    "dataset_operator": lambda: (
        fvp.dataset_operator(lambda x: fvp.fisher(model, HEAD, PARAMS, x), [X[:3], X[3:]]) @ PARAMS
    ),
    "describe": lambda: len(fvp.describe(fvp.scale_by_fisher(model, HEAD).init(PARAMS))),
    "diagnostics": lambda: fvp.diagnostics(damped_state())["step"],
    "diagonal_preconditioner": lambda: fvp.diagonal_preconditioner(PARAMS, 2.0).mv(GRADIENT),
    "eigenpairs": lambda: fvp.eigenpairs(FISHER, 2, KEY),
    "empirical_fisher": lambda: fvp.empirical_fisher(*PROBLEM, Y) @ PARAMS,
    "empirical_fisher_vector_product": lambda: fvp.empirical_fisher_vector_product(
        *PROBLEM, Y, PARAMS
    ),
    "fisher": lambda: FISHER @ PARAMS,
    "fisher_diagonal": lambda: fvp.fisher_diagonal(*PROBLEM),
    "fisher_vector_product": lambda: fvp.fisher_vector_product(*PROBLEM, PARAMS),
    "ggn": lambda: fvp.ggn(*PROBLEM, Y, chunk_size=3) @ PARAMS,
    "ggn_vector_product": lambda: fvp.ggn_vector_product(*PROBLEM, Y, PARAMS),
    "hessian": lambda: fvp.hessian(*PROBLEM, Y) @ PARAMS,
    "influence": lambda: fvp.influence(
        *PROBLEM, X[:2], damping=0.1, train_targets=Y, query_targets=Y[:2]
    ),
    "kfac": lambda: fvp.kfac(*PROBLEM).solve(GRADIENT, 0.1),
    "laplace": lambda: fvp.laplace(*PROBLEM).variance(),
    "mc_fisher": lambda: fvp.mc_fisher(*PROBLEM, KEY) @ PARAMS,
    "mean_over_batches": lambda: fvp.mean_over_batches(
        lambda x: fvp.fisher_diagonal(model, HEAD, PARAMS, x), [X[:3], X[3:]]
    ),
    "natural_gradient": lambda: step(fvp.natural_gradient(1.0, model, HEAD)),
    "nystrom_preconditioner": lambda: fvp.nystrom_preconditioner(
        FISHER, PARAMS, 0.1, KEY, rank=2
    ).mv(PARAMS),
    "scale_by_fisher": lambda: step(fvp.scale_by_fisher(model, HEAD, solver="dual")),
    "scale_by_kfac": lambda: step(fvp.scale_by_kfac(model, HEAD)),
    "solve_dual": lambda: fvp.solve_dual(FISHER, GRADIENT, 0.1),
    "trace": lambda: fvp.trace(FISHER, KEY, 4),
}
RECORDS = {
    "CGInfo",
    "Estimate",
    "Summary",
    "DampedCurvature",
    "Observation",
    "Problem",
    "Root",
    "Coverage",
    "CurvatureComparison",
    "CurvatureOperator",
    "DatasetOperator",
    "KFAC",
    "KFACInverse",
    "KFACState",
    "NaturalGradientState",
    "Posterior",
}


# What a user derives from: tests/test_extending.py.
BASES = {
    "DampedSolver",
    "DampedSystem",
    "DampingRule",
    "Head",
    "NaturalHead",
    "OutputCurvature",
    "Preconditioner",
}


def test_every_name_is_here():
    assert set(CALLS) | RECORDS | BASES == set(fvp.__all__)


def test_dir_shows_the_public_names_alone():
    optional = {"interop", "linen", "nnx"}
    assert {name for name in dir(fvp) if not name.startswith("_")} == {*fvp.__all__} | optional


@pytest.mark.parametrize("name", CALLS)
def test_gives_finite_numbers(name):
    leaves = jax.tree.leaves(CALLS[name]())
    assert leaves
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in leaves)


def test_training_goes_down():
    tx = optax.chain(fvp.natural_gradient(1.0, model, HEAD))
    loss = lambda params: HEAD.nll(model(params, X), Y).mean()

    @jax.jit
    def train(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=X, targets=Y)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = train(params, state)
    assert loss(params) < loss(PARAMS) - 0.1


def test_the_version_is_that_of_the_package():
    assert fvp.__version__ == importlib.metadata.version("fvp")


@pytest.mark.parametrize("version", BROKEN)
def test_importing_beside_a_broken_jax_warns(version):
    with pytest.warns(UserWarning, match=f"jax {version} is not supported"):
        warn_if_broken(version)
