"""Kronecker factors: where they are exact they equal the dense matrix, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, product_matrix, quick_jit, relative_error
from jax.flatten_util import ravel_pytree
from models import MODELS, affine, conv, layer, normal, weight

import fvp

COMPILE_QUICKLY = True

RULES = ("exact", "pi", "factored")


def blocks(params, matrix, groups):
    """``matrix`` with everything outside the diagonal blocks of parameter groups zeroed."""
    labels, _ = ravel_pytree(
        jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full(
                x.shape, float([g in jax.tree_util.keystr(path) for g in groups].index(True))
            ),
            params,
        )
    )
    return jnp.where(labels[:, None] == labels, matrix, 0)


def fisher_blocks(model_fn, head, params, batch, groups, **options):
    matrix = quick_jit(lambda p: product_matrix(fvp.fisher(model_fn, head, p, batch, **options)))(
        params
    )
    return blocks(params, matrix, groups)


def factored(model_fn, head, params, batch, **options):
    return quick_jit(lambda p: fvp.kfac(model_fn, head, p, batch, **options).dense())(params)


@pytest.mark.each_value
@pytest.mark.parametrize("name", ["softmax", "sigmoid-2d", "gaussian-precision", "gaussian-0d"])
@pytest.mark.parametrize("copies", [1, 3])
def test_exact_for_one_example_and_its_copies(name, copies):
    case, rng = CASES[name], np.random.default_rng(0)
    model_fn, params = mlp(case.event_shape), parameters(rng, case.size)
    x = jnp.repeat(normal(rng, 1, 2), copies, axis=0)
    expected = fisher_blocks(model_fn, case.head, params, x, ["out", "hidden"])
    assert relative_error(factored(model_fn, case.head, params, x), expected) < 1e-8
    actual = factored(model_fn, case.head, params, x, eigenvalue_corrected=True)
    assert relative_error(actual, expected) < 1e-8


def test_exact_for_a_deep_linear_network_and_tokens_are_examples():
    rng = np.random.default_rng(0)
    params = [layer(rng, 3, 4), layer(rng, 4, 2)]
    model_fn = lambda params, x: affine(params[1], affine(params[0], x))
    x, weights = normal(rng, 3, 2, 3), jnp.asarray(rng.uniform(size=(3, 2)))
    head = fvp.Gaussian(scale=0.7)
    expected = fisher_blocks(model_fn, head, params, x, ["[0]", "[1]"], weights=weights)
    assert relative_error(factored(model_fn, head, params, x, weights=weights), expected) < 1e-8
    flat = factored(model_fn, head, params, x.reshape(6, 3), weights=weights.ravel())
    assert relative_error(flat, expected) < 1e-8


def test_reduce_is_exact_for_a_linear_network_that_averages_tokens():
    rng = np.random.default_rng(0)
    params = [layer(rng, 3, 4), layer(rng, 4, 2)]
    model_fn = lambda params, x: affine(params[1], affine(params[0], x).mean(1))
    x, head = normal(rng, 4, 5, 3), fvp.Gaussian()
    expected = fisher_blocks(model_fn, head, params, x, ["[0]", "[1]"])
    actual = factored(model_fn, head, params, x, weight_sharing="reduce")
    assert relative_error(actual, expected) < 1e-8
    assert relative_error(factored(model_fn, head, params, x), expected) > 1e-2


def test_a_one_by_one_convolution_is_a_dense_layer_on_pixels():
    rng = np.random.default_rng(0)
    params = {"w": weight(rng, 1, 1, 3, 2), "b": normal(rng, 2)}
    x = normal(rng, 2, 3, 3, 3)
    by_conv = factored(lambda p, x: conv(x, p["w"]) + p["b"], fvp.Softmax(), params, x)
    by_dense = factored(lambda p, x: x @ p["w"][0, 0] + p["b"], fvp.Softmax(), params, x)
    assert relative_error(by_conv, by_dense) < 1e-10


def test_empirical_factors_are_exact_for_one_example():
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model_fn, params, x = mlp((3,)), parameters(rng, 3), normal(rng, 1, 2)
    targets = jnp.array([1])
    dense = product_matrix(fvp.empirical_fisher(model_fn, case.head, params, x, targets))
    expected = blocks(params, dense, ["out", "hidden"])
    actual = factored(model_fn, case.head, params, x, targets=targets)
    assert relative_error(actual, expected) < 1e-8


@pytest.mark.parametrize("name", ["mlp", "rnn"])
def test_eigenvalue_correction_is_closer_and_keeps_the_trace(name):
    make = MODELS[name]
    model_fn, params, batch = make.make(np.random.default_rng(0))
    head = make.case.head
    operator = jax.jit(lambda: fvp.kfac(model_fn, head, params, batch))()
    corrected = jax.jit(
        lambda: fvp.kfac(model_fn, head, params, batch, eigenvalue_corrected=True)
    )()
    support = operator.dense() != 0  # the blocks
    fisher = jnp.where(support, product_matrix(fvp.fisher(model_fn, head, params, batch)), 0)
    distance = lambda K: jnp.linalg.norm(K.dense() - fisher)
    assert distance(corrected) < distance(operator)
    assert relative_error(corrected.trace(), jnp.trace(fisher)) < 1e-9


def problem():
    rng = np.random.default_rng(0)
    params = {
        "embedding": normal(rng, 5, 3),
        "w": weight(rng, 3, 4),
        "b": normal(rng, 4),
        "scale": normal(rng, 4),
        "out": weight(rng, 4, 2),
        "unused": normal(rng, 2),
    }

    def model_fn(p, tokens):
        h = jnp.tanh(p["embedding"][tokens] @ p["w"] + p["b"]) * p["scale"]
        return h.mean(1) @ p["out"]

    return model_fn, fvp.Softmax(), params, jnp.asarray(rng.integers(0, 5, (6, 3)))


@pytest.mark.parametrize("eigenvalue_corrected", [False, True])
def test_trace_determinant_and_exact_inverse(eigenvalue_corrected):
    arguments = problem()
    operator = fvp.kfac(*arguments, eigenvalue_corrected=eigenvalue_corrected)
    matrix = np.asarray(operator.dense())
    damped = matrix + 0.1 * np.eye(len(matrix))
    assert abs(operator.trace() - np.trace(matrix)) < 1e-10
    assert abs(operator.logdet(0.1) - np.linalg.slogdet(damped)[1]) < 1e-9
    vector, unravel = ravel_pytree(jax.tree.map(jnp.sin, arguments[2]))
    solution = ravel_pytree(operator.solve(unravel(vector), 0.1))[0]
    assert relative_error(solution, np.linalg.solve(damped, vector)) < 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_damping_rules_invert_what_they_say(rule):
    arguments = problem()
    operator = fvp.kfac(*arguments)
    inverse = operator.inverse(0.1, rule=rule)
    for block, factor in zip(operator.blocks, inverse.factors, strict=True):
        diagonal = lambda m: jnp.asarray(np.diag(m) if m.ndim == 1 else m)
        left, right = diagonal(np.asarray(block.left[0])), block.right[0]
        eye = lambda m: np.eye(len(m))
        pi = {
            "factored": 1.0,
            "pi": np.sqrt(np.trace(left) / len(left) * len(right) / np.trace(right)),
        }
        if rule == "exact":
            expected = np.kron(left, right) + 0.1 * np.eye(len(left) * len(right))
        else:
            split = pi[rule] * np.sqrt(0.1)
            expected = np.kron(left + split * eye(left), right + 0.1 / split * eye(right))
        weights = np.random.default_rng(0).normal(size=(1, len(left), len(right)))
        solved = np.linalg.solve(expected, weights.ravel())
        assert relative_error(factor.multiply(jnp.asarray(weights)).ravel(), solved) < 1e-9


def tied(x, w, v):
    return jnp.tanh(x @ w) @ v.T


def test_a_weight_used_both_ways_has_the_factors_of_its_uses_by_their_shares_of_the_trace():
    rng = np.random.default_rng(0)
    w, x = weight(rng, 4, 3), normal(rng, 5, 4)
    K = fvp.kfac(lambda w, x: tied(x, w, w), fvp.Gaussian(), w, x)
    apart = fvp.kfac(lambda p, x: tied(x, *p), fvp.Gaussian(), (w, w), x)
    # The inputs of the one use are outputs of the other.
    first, second = apart.blocks
    pairs = [(first.left[0], first.right[0]), (second.right[0], second.left[0])]
    traces = np.array([(np.trace(left), np.trace(right)) for left, right in pairs])
    shares = traces.prod(1) / traces.prod(1).sum()
    mean = lambda side: sum(
        share * pair[side] / trace[side]
        for share, pair, trace in zip(shares, pairs, traces, strict=True)
    )
    np.testing.assert_allclose(K.trace(), apart.trace(), rtol=1e-12)
    expected = np.kron(mean(0), mean(1)) * traces.prod(1).sum()
    assert relative_error(K.dense(), expected) < 1e-10


@pytest.mark.parametrize("empty", ["inputs", "cotangents"])
def test_a_factor_of_zeros_leaves_the_split_of_the_damping_even(empty):
    """With pi = 0 or infinity one side would be inverted without any damping."""
    rng = np.random.default_rng(0)
    params = {"w": normal(rng, 3, 2), "v": normal(rng, 2, 2)}
    x = jnp.zeros((4, 3)) if empty == "inputs" else normal(rng, 4, 3)
    # A second layer of zeros passes nothing back.
    params = params if empty == "inputs" else {**params, "v": jnp.zeros((2, 2))}
    K = fvp.kfac(lambda p, x: (x @ p["w"]) @ p["v"], fvp.Gaussian(), params, x)
    ones = jax.tree.map(jnp.ones_like, params)
    actual, expected = (K.inverse(0.1, rule=rule).mv(ones)["w"] for rule in ("pi", "factored"))
    assert relative_error(actual, expected) < 1e-12


def test_monte_carlo_factors_are_unbiased():
    model_fn, head, params, batch = problem()
    exact = fvp.kfac(model_fn, head, params, batch)
    draw = lambda key: fvp.kfac(model_fn, head, params, batch, key=key).blocks
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
    for sampled, block in zip(draws, exact.blocks, strict=True):
        right = np.asarray(sampled.right)
        error = right.std(0, ddof=1) / 20
        moving = error > 1e-12
        score = np.abs(right.mean(0) - block.right) / np.where(moving, error, 1)
        assert np.asarray(score)[moving].max() < 5
        assert relative_error(sampled.left[0], block.left) < 1e-12


@pytest.mark.parametrize("name", ["transformer", "pde_residual"])
def test_overlapping_uses_without_common_factors_raise_or_fall_back(name):
    make = MODELS[name]
    model_fn, params, batch = make.make(np.random.default_rng(0))
    if name == "pde_residual":
        with pytest.raises(ValueError, match=r"params\['hidden'\]\['w'\].*overlap"):
            fvp.kfac(model_fn, make.case.head, params, batch)
    operator = fvp.kfac(model_fn, make.case.head, params, batch, fallback="per_example")
    assert len(operator.coverage) == len(jax.tree.leaves(params))
    if name == "pde_residual":
        assert operator.coverage["params['hidden']['w']"].startswith("row by row")
        diagonal = fvp.fisher_diagonal(model_fn, make.case.head, params, batch)
        ones = jax.tree.map(jnp.ones_like, params)
        product = (operator @ ones)["hidden"]["w"]
        assert relative_error(product, diagonal["hidden"]["w"]) < 1e-9


def test_preconditions_conjugate_gradients_and_crosses_jit():
    rng = np.random.default_rng(0)
    params = layer(rng, 20, 3)
    x = normal(rng, 50, 20) * jnp.logspace(0, -2, 20)
    head = fvp.Gaussian()
    operator = fvp.fisher(lambda p, x: affine(p, x), head, params, x)
    factors = jax.jit(lambda p: fvp.kfac(lambda p, x: affine(p, x), head, p, x))(params)
    x, plain = fvp.cg(operator, params, damping=1e-4, tol=1e-8)
    solve = jax.jit(lambda M: fvp.cg(operator, params, damping=1e-4, tol=1e-8, M=M))
    y, preconditioned = solve(factors.inverse(1e-4))
    assert preconditioned.converged
    assert preconditioned.iterations <= 2 < plain.iterations
    assert relative_error(y, x) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_factors_that_are_not_finite_do_not_reach_the_solution(rule):
    model_fn, head, params, batch = problem()  # with a lookup, whose left factor is diagonal
    operator = fvp.kfac(model_fn, head, params, batch)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), operator)
    solution = broken.inverse(0.1, rule=rule).mv(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solution))


def test_wrong_arguments_are_named():
    arguments = problem()
    with pytest.raises(ValueError, match="weight_sharing"):
        fvp.kfac(*arguments, weight_sharing="sum")
    with pytest.raises(ValueError, match="targets, key"):
        fvp.kfac(*arguments, targets=jnp.zeros(6, int), key=jax.random.key(0))
    with pytest.raises(ValueError, match="rule"):
        fvp.kfac(*arguments).inverse(0.1, rule="tikhonov")


def test_a_singular_curvature_has_no_undamped_inverse():
    rng = np.random.default_rng(0)
    params, x = layer(rng, 4, 2), normal(rng, 3, 4)  # three examples, five inputs
    K = fvp.kfac(lambda p, x: affine(p, x), fvp.Gaussian(), params, x)
    with pytest.raises(ValueError, match=r"damping.*singular"):
        K.solve(params, 0.0)
    with pytest.raises(ValueError, match="damping"):
        K.solve(params, float("nan"))
    regular = fvp.kfac(lambda p, x: affine(p, x), fvp.Gaussian(), params, normal(rng, 9, 4))
    assert relative_error(regular @ regular.solve(params, 0.0), params) < 1e-9


def test_negative_weights_raise_where_square_roots_are_taken():
    rng = np.random.default_rng(0)
    params, x, weights = layer(rng, 4, 2), normal(rng, 3, 4), jnp.array([1.0, -0.5, 2.0])
    arguments = (lambda p, x: affine(p, x), fvp.Gaussian(), params, x)
    F = fvp.fisher(*arguments, weights=weights)
    for call in (
        lambda: fvp.kfac(*arguments, weights=weights),
        lambda: fvp.fisher_diagonal(*arguments, weights=weights),
        lambda: fvp.solve_dual(F, params, 0.1),
    ):
        with pytest.raises(ValueError, match=r"weights.*0 or more, got -0.5"):
            call()
