"""The part of the softmax curvature between the true class and the rest, against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import relative_error
from jax.flatten_util import ravel_pytree

import fvp
from fvp.solvers.whitened_jacobian import WhitenedJacobian

COMPILE_QUICKLY = True

RNG = np.random.default_rng(5)
CLASSES = 5
X = jnp.asarray(RNG.normal(size=(7, 3)))
Y = jnp.asarray(RNG.integers(0, CLASSES, 7))
WEIGHTS = jnp.asarray([1.0, 0.0, 2.0, 0.5, 0.0, 3.0, 1.5])
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(3, 4))),
    "b": jnp.asarray(RNG.normal(size=(4, CLASSES))),
}
HEAD = fvp.Softmax()


def model_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def matrices(z, y):
    """The part and the whole of each example, from the definition, in NumPy."""
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    parts, wholes = [], []
    for row, label in zip(p, y, strict=True):
        q = np.where(np.arange(len(row)) == label, 0, row) / (1 - row[label])
        d = np.eye(len(row))[label] - q
        parts.append(row[label] * (1 - row[label]) * np.outer(d, d))
        wholes.append(np.diag(row) - np.outer(row, row))
        rest = (1 - row[label]) * (np.diag(q) - np.outer(q, q))
        np.testing.assert_allclose(parts[-1] + rest, wholes[-1], atol=1e-15)
    return np.stack(parts), np.stack(wholes)


def dense(per_example, weights=WEIGHTS):
    flat, unravel = ravel_pytree(PARAMS)
    jacobian = np.asarray(jax.jacobian(lambda v: model_fn(unravel(v), X))(flat))
    shares = np.asarray(weights / weights.sum())
    return np.einsum("i,ica,icd,idb->ab", shares, jacobian, per_example, jacobian)


def operator(**options):
    return fvp.gauss_newton(
        fvp.TrueVersusRest, model_fn, HEAD, PARAMS, X, targets=Y, weights=WEIGHTS, **options
    )


def test_it_is_the_dense_matrix_and_below_the_whole():
    part, whole = (dense(m) for m in matrices(np.asarray(model_fn(PARAMS, X)), np.asarray(Y)))
    G = operator()
    assert relative_error(G.dense(), part) < 1e-13
    assert (
        relative_error(
            ravel_pytree(operator(chunk_size=3) @ PARAMS)[0], part @ ravel_pytree(PARAMS)[0]
        )
        < 1e-13
    )
    assert (
        relative_error(fvp.hessian(model_fn, HEAD, PARAMS, X, Y, weights=WEIGHTS).dense(), whole)
        > 0
    )
    assert np.linalg.eigvalsh(whole - part).min() > -1e-14
    assert np.trace(part) > 0.1 * np.trace(whole)


def test_of_two_classes_it_is_the_whole():
    model = lambda params, x: model_fn(params, x)[:, :2]
    y, data = Y % 2, {"weights": WEIGHTS}
    G = fvp.gauss_newton(fvp.TrueVersusRest, model, HEAD, PARAMS, X, targets=y, **data)
    assert relative_error(G.dense(), fvp.ggn(model, HEAD, PARAMS, X, y, **data).dense()) < 1e-13


@pytest.mark.parametrize("given", [True, False], ids=["targets", "no targets"])
def test_an_exact_solve_has_one_row_for_each_example(given):
    G = operator()
    assert WhitenedJacobian.of(G).columns.shape[0] == 1
    part = dense(matrices(np.asarray(model_fn(PARAMS, X)), np.asarray(Y))[0])
    _, gradient = G.value_and_grad(Y)
    flat, unravel = ravel_pytree(gradient)
    expected = np.linalg.solve(part + 1e-3 * np.eye(len(flat)), flat)
    solution = fvp.solve_dual(G, unravel(flat), 1e-3, targets=Y if given else None)
    assert relative_error(ravel_pytree(solution)[0], expected) < 1e-9


def test_tokens_are_rows_too():
    x, y = X[:6].reshape(2, 3, 3), Y[:6].reshape(2, 3)
    arguments = fvp.TrueVersusRest, model_fn, HEAD, PARAMS
    G = fvp.gauss_newton(*arguments, x, targets=y)
    same = fvp.gauss_newton(*arguments, X[:6], targets=Y[:6])
    assert relative_error(G.dense(), same.dense()) < 1e-13


@pytest.mark.parametrize("margin", [0.0, 30.0, 80.0, 1e4, jnp.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_certain_and_hopeless_rows_keep_their_digits(margin, sign):
    z = jnp.asarray([[0.0, 0.5, -1.0]], jnp.float32).at[0, 0].set(sign * margin)
    problem = fvp.Problem.of(lambda z, x: z, HEAD, z, jnp.zeros((1, 1)), targets=jnp.array([0]))
    curvature = fvp.TrueVersusRest.at(problem, z)
    root = curvature.root()
    column, w = np.asarray(root.column(0)[0]), np.asarray(root.score(jnp.array([0]))[0])
    assert np.isfinite(column).all()
    assert np.isfinite(w).all()
    m = sign * margin - np.log(np.exp(0.5) + np.exp(-1.0))
    scale = np.exp(-abs(m) / 2) / (1 + np.exp(-abs(m)))
    np.testing.assert_allclose(column[0], scale, rtol=1e-5, atol=1e-38)
    if scale > 1e-30:
        rtol = 2 * float(jnp.finfo(jnp.float32).eps) * (4 + abs(m))
        np.testing.assert_allclose(w * column, -HEAD.score(z, jnp.array([0]))[0], rtol=rtol)
    assert np.isnan(root.score(jnp.array([1]))).all()


@pytest.mark.parametrize("solver", ["cg", "dual"])
def test_steps_with_it_minimise_the_loss(solver):
    tx = fvp.natural_gradient(1.0, model_fn, HEAD, curvature=fvp.TrueVersusRest, solver=solver)
    loss = lambda params: HEAD.nll(model_fn(params, X), Y).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=X, targets=Y)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 1e-3 * loss(PARAMS)


def test_what_it_is_not_for_is_named():
    make = lambda head, y: fvp.gauss_newton(
        fvp.TrueVersusRest, model_fn, head, PARAMS, X, targets=y
    )
    with pytest.raises(TypeError, match=r"head: TrueVersusRest expects fvp.Softmax"):
        make(fvp.Sigmoid(), jnp.zeros((7, CLASSES)))
    with pytest.raises(TypeError, match=r"targets: TrueVersusRest expects integer labels"):
        make(HEAD, jnp.full((7, CLASSES), 0.2))
    with pytest.raises(ValueError, match="targets"):
        make(HEAD, None)


def test_labels_out_of_range_are_not_finite_and_do_no_harm_without_weight():
    y = Y.at[1].set(-100)
    arguments = fvp.TrueVersusRest, model_fn, HEAD, PARAMS, X
    masked = fvp.gauss_newton(*arguments, targets=y, weights=WEIGHTS) @ PARAMS
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), masked, operator() @ PARAMS)
    product = fvp.gauss_newton(*arguments, targets=y) @ PARAMS
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(product))
