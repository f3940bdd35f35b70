"""Influence scores beside dense solves and beside training without an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import CASES, mlp, parameters, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True


def dense_scores(model, head, params, train, query, damping, train_targets, query_targets, weights):
    """From Jacobians, the matrix and a direct solve."""
    flat, unravel = ravel_pytree(params)
    single = lambda x, y: (
        lambda flat: head.nll(model(unravel(flat), x), y).reshape(len(x), -1).sum(1)
    )
    gradients = jax.jacobian(single(train, train_targets))(flat)
    wanted = jax.jacobian(single(query, query_targets))(flat)
    H = fvp.ggn(model, head, params, train, train_targets, weights=weights).dense()
    return -wanted @ jnp.linalg.solve(H + damping * jnp.eye(flat.size), gradients.T)


@pytest.mark.each_value
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gaussian-precision", "gaussian-0d"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_equal_the_dense_ones(name, weighted):
    case, rng = CASES[name], np.random.default_rng(0)
    model, params = mlp(case.event_shape), parameters(rng, case.size)
    train, query = (jnp.asarray(rng.normal(size=(n, 2))) for n in (12, 3))
    targets = [case.targets(rng, (n,)) for n in (12, 3)]
    weights = jnp.asarray(rng.uniform(0.5, 2, 12)) if weighted else None
    options = {"train_targets": targets[0], "query_targets": targets[1], "weights": weights}
    actual = fvp.influence(model, case.head, params, train, query, damping=1e-3, **options)
    expected = dense_scores(model, case.head, params, train, query, 1e-3, *targets, weights)
    assert actual.shape == (3, 12)
    assert relative_error(actual, expected) < 1e-8


def test_tokens_of_an_example_add_up():
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model, params = mlp(case.event_shape), parameters(rng, 3)
    train, query = (jnp.asarray(rng.normal(size=(n, 4, 2))) for n in (5, 2))
    targets = [case.targets(rng, (n, 4)) for n in (5, 2)]
    options = {"train_targets": targets[0], "query_targets": targets[1]}
    actual = fvp.influence(model, case.head, params, train, query, damping=1e-2, **options)
    expected = dense_scores(model, case.head, params, train, query, 1e-2, *targets, None)
    assert actual.shape == (2, 5)
    assert relative_error(actual, expected) < 1e-8


def test_a_model_without_layer_rules_is_solved_for_without_a_preconditioner():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(0.3 * rng.normal(size=(3, 3)))}
    model = lambda p, x: jnp.tanh(x @ jnp.linalg.inv(jnp.eye(3) + p["w"]))
    x, y = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.integers(0, 3, 6))
    options = {"train_targets": y, "query_targets": y[:2]}
    actual = fvp.influence(model, fvp.Softmax(), params, x, x[:2], damping=1e-2, **options)
    expected = dense_scores(model, fvp.Softmax(), params, x, x[:2], 1e-2, y, y[:2], None)
    assert relative_error(actual, expected) < 1e-8


def test_scores_tell_what_training_without_an_example_does():
    """Logistic regression with an l2 term, trained to the end without each of 200 examples."""
    rng = np.random.default_rng(0)
    x, l2, head = jnp.asarray(rng.normal(size=(200, 4))), 1e-2, fvp.Sigmoid()
    labels = rng.random((200, 1)) < jax.nn.sigmoid(x @ jnp.array([[2.0], [-1.0], [0.5], [0.0]]))
    y = jnp.asarray(labels, jnp.float64)
    query, query_y = jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray([[1.0, 0, 1, 0, 1]]).T
    model = lambda w, x: x @ w

    def trained(weights):
        loss = lambda w: weights @ head.nll(x @ w, y) / 200 + 0.5 * l2 * jnp.sum(w**2)

        def step(w, _):
            hessian = jax.hessian(loss)(w).reshape(4, 4)
            return w - jnp.linalg.solve(hessian, jax.grad(loss)(w)), None

        w = jax.lax.scan(step, jnp.zeros((4, 1)), length=12)[0]
        return w, head.nll(query @ w, query_y)

    w, losses = trained(jnp.ones(200))
    without = quick_jit(jax.vmap(lambda weights: trained(weights)[1]))(1 - jnp.eye(200)).T
    options = {"train_targets": y, "query_targets": query_y}
    scores = fvp.influence(model, head, w, x, query, damping=l2, **options)
    change = without - losses[:, None]
    for predicted, actual in zip(-scores / 200, change, strict=True):
        assert np.corrcoef(predicted, actual)[0, 1] > 0.99
    assert relative_error(-scores / 200, change) < 0.1


def test_single_precision_and_jit():
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model, params = mlp(case.event_shape), parameters(rng, 3)
    train, query = (jnp.asarray(rng.normal(size=(n, 2))) for n in (12, 3))
    targets = [case.targets(rng, (n,)) for n in (12, 3)]
    expected = dense_scores(model, case.head, params, train, query, 1e-2, *targets, None)

    @jax.jit
    def scores(params, train, query, damping):
        options = {"train_targets": targets[0], "query_targets": targets[1], "damping": damping}
        return fvp.influence(model, case.head, params, train, query, **options)

    single = jax.tree.map(
        lambda x: x.astype(jnp.float32), (params, train, query, 1e-2 * jnp.ones(()))
    )
    actual = scores(*single)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, expected) < 1e-3
    assert relative_error(scores(params, train, query, 1e-2), expected) < 1e-8


def test_no_damping_where_the_curvature_has_an_inverse():
    x, y = jnp.eye(2), jnp.array([[1.0], [2.0]])
    options = {"train_targets": y, "query_targets": y}
    model = lambda w, x: x @ w
    scores = fvp.influence(model, fvp.Gaussian(), jnp.zeros((2, 1)), x, x, damping=0.0, **options)
    np.testing.assert_allclose(scores, [[-2, 0], [0, -8]], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping: expected"),
        ({"train_targets": None}, "targets: expected"),
        ({"query_targets": None}, "query_targets: expected"),
        ({"weights": [-1.0, 1.0]}, "weights: .* expect 0 or more"),
    ],
)
def test_errors_name_the_argument(options, message):
    y = jnp.zeros((2, 1))
    options = {"damping": 1.0, "train_targets": y, "query_targets": y, **options}
    with pytest.raises(ValueError, match=message):
        fvp.influence(lambda w, x: x @ w, fvp.Gaussian(), y, jnp.eye(2), jnp.eye(2), **options)
