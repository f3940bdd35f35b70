"""The solve in example space equals the dense damped solve, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import (
    CASES,
    each_kind_of_case,
    mlp,
    parameters,
    product_matrix,
    quick_jit,
    rarely,
    reference,
    relative_error,
)
from jax.flatten_util import ravel_pytree
from models import MODELS, normal
from test_models import dense, problem

import fvp

COMPILE_QUICKLY = True


def solution(matrix, rhs, damping):
    flat, unravel = ravel_pytree(rhs)
    return unravel(jnp.linalg.solve(matrix + damping * jnp.eye(flat.size), flat))


@each_kind_of_case
def test_every_head_with_weights_and_masks(case):
    rng = np.random.default_rng(0)
    model_fn, params = mlp(case.event_shape), parameters(rng, case.size)
    x = jnp.asarray(rng.normal(size=(3, 2, 2)))
    targets = case.targets(rng, (3, 2))
    weights = jnp.asarray(rng.uniform(size=(3, 2))).at[0, 1].set(0)
    expected = reference(case, model_fn, params, x, targets, weights)

    @quick_jit
    def solve(params):
        operator = fvp.fisher(model_fn, case.head, params, x, weights=weights)
        _, gradient = operator.value_and_grad(targets)
        whitened = fvp.solve_dual(operator, gradient, 1e-3, targets=targets)
        return gradient, whitened, fvp.solve_dual(operator, params, 1e-3)

    gradient, whitened, general = solve(params)
    assert relative_error(general, solution(expected["fisher"], params, 1e-3)) < 1e-9
    assert relative_error(whitened, solution(expected["fisher"], gradient, 1e-3)) < 1e-9


@pytest.mark.parametrize(
    "name",
    [
        rarely("mlp_with_custom_vjp"),
        "mixture_of_experts",
        "pde_residual",
        pytest.param("resnet_block", marks=pytest.mark.compile_in_full),
        rarely("transformer"),
    ],
)
def test_architectures(name):
    model_fn, params, batch, _, weights = problem(name)
    operator = fvp.fisher(model_fn, MODELS[name].case.head, params, batch, weights=weights)
    actual = fvp.solve_dual(operator, params, 1e-3)
    expected = solution(dense(name)[1]["fisher"], params, 1e-3)
    assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher", "mc_fisher"])
def test_other_curvatures(build, curvature):
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model_fn, params, x = mlp((3,)), parameters(rng, 3), jnp.asarray(rng.normal(size=(4, 2)))
    targets, key = case.targets(rng, (4,)), jax.random.key(0)
    operator = build(curvature, model_fn, case.head, params, x, targets, key)
    expected = solution(operator.dense(), params, 1e-3)
    assert relative_error(fvp.solve_dual(operator, params, 1e-3), expected) < 1e-9


def test_a_use_without_a_layer_rule_takes_its_rows_one_by_one():
    rng = np.random.default_rng(0)
    params = {"strange": jnp.asarray(0.3 * rng.normal(size=(3, 3))), "w": jnp.ones((3, 2))}
    model_fn = lambda p, x: jnp.tanh(x @ jnp.sin(p["strange"])) @ p["w"]
    x = jnp.asarray(rng.normal(size=(4, 3)))
    operator = fvp.fisher(model_fn, fvp.Softmax(), params, x)
    expected = solution(operator.dense(), params, 1e-3)
    assert relative_error(fvp.solve_dual(operator, params, 1e-3), expected) < 1e-9


def test_the_gradient_keeps_its_digits_at_tiny_damping():
    """Reference: the singular values of the whitened rows, where nothing cancels."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(3, 8))), jnp.asarray(rng.normal(size=(3, 2)))
    params = jnp.asarray(rng.normal(size=(8, 2)))
    operator = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), params, x)
    _, gradient = operator.value_and_grad(y)
    actual = fvp.solve_dual(operator, gradient, 1e-12, targets=y)
    left, values, right = np.linalg.svd(np.asarray(x) / np.sqrt(3), full_matrices=False)
    shrunk = (values / (values**2 + 1e-12))[:, None]
    expected = right.T @ (shrunk * (left.T @ np.asarray(x @ params - y) / np.sqrt(3)))
    assert relative_error(actual, jnp.asarray(expected)) < 1e-9


@pytest.mark.parametrize("damping", [1e-7, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("rows", "size"), [(2, 2), (20, 100)])
def test_without_targets_only_rounding_of_the_right_hand_side_meets_the_damping(
    rows, size, damping
):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, size)).astype(np.float32) / np.float32(np.sqrt(size))
    rhs = (x.T @ rng.normal(size=(rows, 1)).astype(np.float32)).astype(np.float32)
    zeros = jnp.zeros((size, 1), jnp.float32)
    operator = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), zeros, jnp.asarray(x))
    actual = fvp.solve_dual(operator, jnp.asarray(rhs), damping)
    wide = x.astype(np.float64)
    matrix = wide.T @ wide / rows + damping * np.eye(size)
    expected = np.linalg.solve(matrix, rhs.astype(np.float64))
    norm = np.linalg.norm
    rounding = np.finfo(np.float32).eps * (1 + (size > rows) * norm(rhs) / damping / norm(expected))
    assert norm(actual - expected) <= 16 * rounding * norm(expected)


@pytest.mark.parametrize("logit", [30.0, 1e4])
def test_probabilities_that_vanish_do_not_blow_up(logit):
    x = jnp.eye(2)
    params = jnp.array([[logit, 0.0, -logit], [0.5, 0.1, 0.0]])
    operator = fvp.fisher(lambda w, x: x @ w, fvp.Softmax(), params, x)
    targets = jnp.array([2, 0])
    _, gradient = operator.value_and_grad(targets)
    actual = fvp.solve_dual(operator, gradient, 1e-2, targets=targets)
    assert relative_error(actual, solution(operator.dense(), gradient, 1e-2)) < 1e-9


def test_several_samples_of_each_example_count_as_their_mean():
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model_fn, params, x = mlp((3,)), parameters(rng, 3), jnp.asarray(rng.normal(size=(4, 2)))
    F = fvp.mc_fisher(model_fn, case.head, params, x, jax.random.key(0), num_samples=3)
    expected = solution(product_matrix(F), params, 1e-2)
    assert relative_error(fvp.solve_dual(F, params, 1e-2), expected) < 1e-9


def test_wrong_operators_and_dampings_are_named():
    x, params = jnp.ones((4, 3)), jnp.ones((3, 2))
    model_fn = lambda w, x: x @ w
    with pytest.raises(ValueError, match="chunk_size"):
        fvp.solve_dual(fvp.fisher(model_fn, fvp.Gaussian(), params, x, chunk_size=2), params, 1.0)
    whole = fvp.fisher(model_fn, fvp.Gaussian(), params, x, chunk_size=4)  # one chunk is none
    assert (
        relative_error(fvp.solve_dual(whole, params, 1.0), solution(whole.dense(), params, 1.0))
        < 1e-9
    )
    with pytest.raises(ValueError, match="damping"):
        fvp.solve_dual(whole, params, 0.0)
    hessian = fvp.hessian(model_fn, fvp.Gaussian(), params, x, jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="Fisher or GGN"):
        fvp.solve_dual(hessian, params, 1.0)


@pytest.mark.parametrize("solver", ["dual", "dense", "auto"])
def test_scale_by_fisher_takes_the_exact_step(solver):
    case, rng = CASES["softmax"], np.random.default_rng(0)
    model_fn, params, x = mlp((3,)), parameters(rng, 3), jnp.asarray(rng.normal(size=(4, 2)))
    targets = case.targets(rng, (4,))
    operator = fvp.fisher(model_fn, case.head, params, x)
    _, gradient = operator.value_and_grad(targets)
    tx = fvp.scale_by_fisher(model_fn, case.head, damping=1e-2, solver=solver)
    update, state = jax.jit(lambda g: tx.update(g, tx.init(params), params, batch=x))(gradient)
    assert relative_error(update, solution(operator.dense(), gradient, 1e-2)) < 1e-9
    assert state.accepted
    assert state.residual_norm < 1e-10


def test_the_solver_is_chosen_by_shape():
    def choose(count, width):
        w, x = jnp.ones((width, 2)), jnp.ones((count, width))
        return type(fvp.Auto().chosen(fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x)))

    assert choose(5, 10) is fvp.Dual
    assert choose(50, 10) is fvp.Dense
    assert choose(500, 600) is fvp.Dual
    assert choose(2500, 600) is fvp.CG


def test_steps_that_may_go_without_damping_read_the_jacobian_where_qr_is_not_most_of_them():
    """Dense always; dual up to 16 parameters for each row."""

    def choose(count, width):
        w, x = jnp.ones((width, 2)), jnp.ones((count, width))
        operator = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x)
        return fvp.Auto().without_damping().chosen(operator), fvp.Auto().chosen(operator)

    assert choose(50, 10) == (fvp.Dense(qr=True), fvp.Dense())
    assert choose(5, 80) == (fvp.Dual(qr=True), fvp.Dual())
    assert choose(5, 81) == (fvp.Dual(), fvp.Dual())


def test_no_damping_and_no_exact_solver_is_an_error():
    tx = fvp.scale_by_fisher(lambda w, x: x @ w, fvp.Gaussian(), solver="auto", line_search="loss")

    def shape_of_step(count, width):
        w, x, y = (jnp.ones(s, jnp.float32) for s in ((width, 2), (count, width), (count, 2)))
        return jax.eval_shape(lambda: tx.update(w, tx.init(w), w, batch=x, targets=y))

    with pytest.raises(ValueError, match="pass damping="):
        shape_of_step(5000, 5000)
    # Where none may be needed a matrix is taken for longer than where CG would do.
    shape_of_step(2500, 600)


@dataclasses.dataclass(frozen=True)
class Cauchy(fvp.Gaussian):
    """A head whose Hessian is not its Fisher."""

    def _hessian(self, z, y, u):
        return (2 + jnp.square(z - y)) * u

    def _hessian_root(self, z, y):
        return None


def test_a_hessian_that_is_not_the_fisher_is_refused():
    rng = np.random.default_rng(0)
    w, x, y = normal(rng, 3, 2), normal(rng, 4, 3), normal(rng, 4, 2)
    model = lambda w, x: jnp.tanh(x @ w)
    G = fvp.ggn(model, Cauchy(), w, x, y)
    with pytest.raises(TypeError, match=r"none is known.*Hessian of Cauchy"):
        fvp.solve_dual(G, w, 0.1)
    tx = fvp.scale_by_fisher(model, Cauchy(), damping=0.1, curvature="ggn", solver="dual")
    with pytest.raises(TypeError, match=r"none is known.*Hessian of Cauchy"):
        tx.update(w, tx.init(w), w, batch=x, targets=y)
    # "auto" takes another exact solver.
    tx = fvp.scale_by_fisher(model, Cauchy(), damping=0.1, curvature="ggn", solver="auto")
    step, _ = tx.update(w, tx.init(w), w, batch=x, targets=y)
    expected = np.linalg.solve(G.dense() + 0.1 * np.eye(6), w.ravel())
    assert relative_error(step.ravel(), expected) < 1e-6
    # Its Fisher is served.
    F = fvp.fisher(model, Cauchy(), w, x)
    expected = np.linalg.solve(F.dense() + 0.1 * np.eye(6), w.ravel())
    assert relative_error(fvp.solve_dual(F, w, 0.1).ravel(), expected) < 1e-9


def test_rows_of_targets_that_do_not_sum_to_one_count_as_their_sum():
    rng = np.random.default_rng(0)
    w, x = normal(rng, 3, 4), normal(rng, 5, 3)
    rows = jnp.asarray(rng.uniform(size=(5, 4))).at[1].set(0)
    G = fvp.ggn(lambda w, x: x @ w, fvp.Softmax(), w, x, rows)
    _, rhs = G.value_and_grad(rows)
    expected = np.linalg.solve(G.dense() + 0.1 * np.eye(12), rhs.ravel())
    for targets in (None, rows):
        x_dual = fvp.solve_dual(G, rhs, 0.1, targets=targets)
        assert relative_error(x_dual.ravel(), expected) < 1e-9
