"""How far two curvatures are apart, beside their dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import rarely
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True
KEY = jax.random.key(0)


def mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


def problem(inputs, hidden, dtype=jnp.float64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "first": jax.random.normal(keys[0], (inputs, hidden), dtype),
        "last": jax.random.normal(keys[1], (hidden, 3), dtype),
    }
    x = jax.random.normal(keys[2], (30, inputs), dtype)
    return params, x, jax.random.randint(keys[3], (30,), 0, 3)


def dense_comparison(first, second, gradient, damping):
    a, b = (np.asarray(ravel_pytree(m)[0] if isinstance(m, dict) else m) for m in (first, second))
    norm = lambda m: np.sqrt(np.sum(m**2))
    step = lambda m: np.linalg.solve(m + damping * np.eye(len(m)), gradient)
    u, v = step(a), step(b)
    return {
        "difference": norm(a - b) / norm(a),
        "cosine": np.sum(a * b) / norm(a) / norm(b),
        "ratio": norm(b) / norm(a),
        "step_cosine": u @ v / norm(u) / norm(v),
        "step_ratio": norm(v) / norm(u),
    }


def pair(inputs, hidden, dtype=jnp.float64):
    params, x, y = problem(inputs, hidden, dtype)
    F = fvp.fisher(mlp, fvp.Softmax(), params, x)
    E = fvp.empirical_fisher(mlp, fvp.Softmax(), params, x, y)
    return F, E, F.value_and_grad(y)[1]


@pytest.mark.parametrize("compiled", [rarely(False), True])
def test_all_products_give_the_dense_numbers(compiled):
    F, E, gradient = pair(4, 3)
    compare = lambda F, E, g: fvp.compare_curvatures(F, E, g, KEY, damping=0.1, tol=1e-12)
    found = (jax.jit(compare) if compiled else compare)(F, E, gradient)
    expected = dense_comparison(F.dense(), E.dense(), ravel_pytree(gradient)[0], 0.1)
    assert found.converged
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(("dtype", "rtol"), [rarely(jnp.float64, 0.01), (jnp.float32, 0.01)])
def test_fewer_products_than_parameters_come_within_a_hundredth(dtype, rtol):
    F, E, gradient = pair(20, 8, dtype)  # 184 parameters
    found = fvp.compare_curvatures(F, E, gradient, KEY, damping=0.1, num_products=60)
    expected = dense_comparison(F.dense(), E.dense(), ravel_pytree(gradient)[0], 0.1)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=rtol, err_msg=name)


def test_a_curvature_is_no_way_from_itself_and_its_multiples_have_its_direction():
    F, _, gradient = pair(4, 3)
    same = fvp.compare_curvatures(F, F, gradient, KEY, damping=0.1)
    np.testing.assert_allclose(same, (0, 1, 1, 1, 1, 1), atol=1e-7)
    doubled = lambda v: jax.tree.map(lambda x: 2 * x, F @ v)
    twice = fvp.compare_curvatures(F, doubled, gradient, KEY, damping=0.0, maxiter=1)
    np.testing.assert_allclose(twice[:5], (1, 1, 2, 1, 0.5), rtol=1e-7)
    assert not twice.converged


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_do_not_matter(scale):
    g = jnp.arange(1.0, 5.0, dtype=jnp.float32)
    first, second = (lambda v: scale * v), (lambda v: scale * v * g)
    found = fvp.compare_curvatures(first, second, g, KEY, damping=0.0)
    np.testing.assert_allclose(found.ratio, np.sqrt(30 / 4), rtol=1e-5)
    np.testing.assert_allclose(found.difference, np.sqrt(14 / 4), rtol=1e-5)


def test_zeros_are_neither_near_nor_far():
    g, zero = jnp.ones(3), jnp.zeros_like
    both = fvp.compare_curvatures(zero, zero, g, KEY, damping=1.0)
    np.testing.assert_array_equal(both, (0, 0, 0, 1, 1, 1))
    first = fvp.compare_curvatures(zero, lambda v: v, g, KEY, damping=1.0)
    np.testing.assert_array_equal(first[:3], (np.inf, 0, np.inf))


def test_what_cannot_be_compared_is_named():
    g = jnp.ones(3)
    with pytest.raises(TypeError, match="operator"):
        fvp.compare_curvatures(3, lambda v: v, g, KEY, damping=1.0)
    with pytest.raises(ValueError, match="damping"):
        fvp.compare_curvatures(lambda v: v, lambda v: v, g, KEY, damping=-1.0)
    with pytest.raises(ValueError, match="num_products"):
        fvp.compare_curvatures(lambda v: v, lambda v: v, g, KEY, damping=1.0, num_products=1)
