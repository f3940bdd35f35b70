"""The public contract: names, keywords and spellings that code outside relies on, old ones too."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvp

COMPILE_QUICKLY = True

X, Y, KEY = jnp.linspace(0, 1, 12).reshape(4, 3), jnp.array([0, 0, 1, 1]), jax.random.key(0)
PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.zeros(2), "none": None}
HEAD = fvp.Softmax()


def model(params, x):
    return x @ params["w"] + params["b"]


PROBLEM = "model_fn head params batch"
OPTIONS = "weights chunk_size batch_axes"
STEP = "damping curvature solver maxiter tol warm_start momentum max_kl constant_kl l2 line_search"
KFAC_STEP = (
    "damping initial_damping example_batch decay factor_period inverse_period rule weight_sharing"
    " num_samples seed momentum max_kl batch_axes fallback mesh"
)


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        (fvp.fisher, PROBLEM, OPTIONS),
        (fvp.ggn, f"{PROBLEM} targets", OPTIONS),
        (fvp.empirical_fisher, f"{PROBLEM} targets", OPTIONS),
        (fvp.mc_fisher, f"{PROBLEM} key", f"num_samples {OPTIONS}"),
        (fvp.hessian, f"{PROBLEM} targets", OPTIONS),
        (fvp.fisher_vector_product, f"{PROBLEM} vector", OPTIONS),
        (fvp.ggn_vector_product, f"{PROBLEM} targets vector", OPTIONS),
        (fvp.empirical_fisher_vector_product, f"{PROBLEM} targets vector", OPTIONS),
        (fvp.cg, "operator rhs", "damping x0 tol atol maxiter M"),
        (fvp.kfac, PROBLEM, "targets weights key weight_sharing"),
        (fvp.fisher_diagonal, PROBLEM, "weights key"),
        (fvp.solve_dual, "operator rhs damping", "targets"),
        (fvp.kl_divergence, "model_fn head params new_params batch", "weights"),
        (fvp.standard_errors, f"{PROBLEM} targets", "weights kind"),
        (fvp.parameter_covariance, f"{PROBLEM} targets", "weights kind"),
        (fvp.delta_method, "function params covariance", "information tol maxiter"),
        (fvp.confidence_intervals, "params standard_errors", "level"),
        (fvp.summary, "params standard_errors", "level name"),
        (fvp.ewc_penalty, "params anchor importance strength", ""),
        (fvp.density_fisher, "log_prob sample params key num_samples", ""),
        (fvp.score_fisher, "log_prob params samples", "weights centered"),
        (fvp.fisher_divergence, "score_fn x key", "num_slices"),
        (
            fvp.scale_by_fisher,
            "model_fn head",
            f"{STEP} geodesic {OPTIONS} axis_name".replace("weights ", ""),
        ),
        (fvp.natural_gradient, "learning_rate model_fn head", STEP),
        (fvp.scale_by_kfac, "model_fn head", KFAC_STEP),
        (fvp.Gaussian, "scale precision event_ndim", ""),
        (fvp.Sigmoid, "event_ndim", ""),
        (fvp.Softmax, "", ""),
        (fvp.LearnedScaleGaussian, "", ""),
        (fvp.Poisson, "event_ndim", ""),
        (fvp.StudentT, "df scale event_ndim", ""),
        (fvp.Multinomial, "total", ""),
        (fvp.Product, "heads weights", ""),
        (
            fvp.FromDistribution,
            "make_distribution support fisher_matrix divergence num_samples key event_ndim",
            "",
        ),
        (fvp.ExponentialFamily, "log_partition sufficient_statistic sampler event_ndim", ""),
        (fvp.LevenbergMarquardt, "initial increase decrease", ""),
        (fvp.diagonal_preconditioner, "diagonal damping exponent", ""),
        (fvp.nystrom_preconditioner, "operator like damping key", "rank"),
    ],
)
def test_arguments_keep_their_names_and_places(function, positional, keywords):
    parameters = inspect.signature(function).parameters
    kinds = inspect.Parameter
    places = [n for n, p in parameters.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    assert places == positional.split()
    named = {n for n, p in parameters.items() if p.kind is kinds.KEYWORD_ONLY}
    assert set(keywords.split()) <= named


def test_an_operator_and_its_methods():
    F = fvp.fisher(model, HEAD, PARAMS, X)
    product = F @ PARAMS
    assert jax.tree.structure(product) == jax.tree.structure(PARAMS)
    assert all(map(np.array_equal, jax.tree.leaves(product), jax.tree.leaves(F.mv(PARAMS))))
    assert np.isclose(F.quadratic_form(PARAMS), optax.tree.vdot(PARAMS, product))
    assert F.output.shape == (4, 2)
    assert F.dense().shape == (8, 8)
    through = jax.jit(lambda F: F @ PARAMS)(F)
    assert np.allclose(through["w"], product["w"])
    assert jax.vmap(F.mv)(jax.tree.map(lambda p: p[None], PARAMS))["w"].shape == (1, 3, 2)


def test_a_solve_is_a_pair_with_a_record():
    F = fvp.fisher(model, HEAD, PARAMS, X)
    for operator in (F, F.mv, lambda v: F @ v):
        x, info = fvp.cg(operator, PARAMS, damping=0.1, tol=1e-10)
        assert {"iterations", "residual_norm", "converged", "breakdown"} <= set(info._fields)
        assert info.converged
        assert not info.breakdown
    assert jax.tree.structure(x) == jax.tree.structure(PARAMS)
    K = fvp.kfac(model, HEAD, PARAMS, X, weight_sharing="reduce")
    for M in (K.inverse(0.1), lambda v: K.solve(v, 0.1)):
        assert fvp.cg(F, PARAMS, damping=0.1, M=M)[1].converged
    assert K.coverage["params['w']"] == "dense"
    assert np.allclose((K @ PARAMS)["w"], K.mv(PARAMS)["w"])


def step(tx, **keywords):
    gradient = jax.grad(lambda p: HEAD.nll(model(p, X), Y).mean())(PARAMS)
    return tx.update(gradient, tx.init(PARAMS), PARAMS, **{"batch": X, **keywords})


TRANSFORMS = {
    "plain": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1),
    "schedule": lambda: fvp.scale_by_fisher(model, HEAD, damping=lambda count: 0.1 + 0 * count),
    "rule": lambda: fvp.scale_by_fisher(model, HEAD, damping=fvp.LevenbergMarquardt()),
    "alias": lambda: fvp.natural_gradient(1.0, model, HEAD, damping=0.1),
    "defaults": lambda: fvp.natural_gradient(1.0, model, HEAD),
    "ggn": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1, curvature="ggn"),
    "empirical": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1, curvature="empirical"),
    "dual": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1, solver="dual"),
    "dense": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1, solver="dense"),
    "auto": lambda: fvp.scale_by_fisher(model, HEAD, damping=0.1, solver="auto"),
    "keywords of cg": lambda: fvp.scale_by_fisher(
        model, HEAD, damping=0.1, solver="cg", maxiter=5, tol=1e-3, warm_start=True
    ),
    "kfac": lambda: fvp.scale_by_kfac(model, HEAD),
    "kfac with a number": lambda: fvp.scale_by_kfac(model, HEAD, damping=0.1),
    "kfac without momentum": lambda: fvp.scale_by_kfac(model, HEAD, momentum=False),
    "kfac with momentum": lambda: fvp.scale_by_kfac(model, HEAD, damping=0.1, momentum=True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_step_and_its_diagnostics(name):
    tx = TRANSFORMS[name]()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    updates, state = step(tx, targets=Y, unknown="tolerated")
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))
    sign = -1 if name in ("alias", "defaults") else 1
    gradient = jax.grad(lambda p: HEAD.nll(model(p, X), Y).mean())(PARAMS)
    assert sign * optax.tree.vdot(updates, gradient) > 0
    for field in (
        "iterations",
        "residual_norm",
        "damping",
        "predicted_kl",
        "accepted",
        "gradient_mismatch",
    ):
        assert np.isfinite(optax.tree.get(state, field))
    before = jax.eval_shape(tx.init, PARAMS)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(before) == shapes(state)


@pytest.mark.parametrize("name", ["plain", "dual", "kfac with a number"])
def test_the_oracle_form_takes_an_operator(name):
    tx = TRANSFORMS[name]()
    F = fvp.fisher(model, HEAD, PARAMS, X)
    _, gradient = F.value_and_grad(Y)
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS, operator=F)
    expected, _ = step(tx)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert np.allclose(a, b, rtol=1e-6)


def test_the_state_has_one_type_for_all_transforms():
    for name in ("plain", "defaults", "kfac"):
        _, state = step(TRANSFORMS[name](), targets=Y)
        assert isinstance(state, fvp.NaturalGradientState)
    assert isinstance(state.solver, fvp.KFACState)
