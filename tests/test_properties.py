"""Properties of Fisher products on networks, heads, weights, dtypes and chunks that are drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from dense import CASES, quick_jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

SLOW = [HealthCheck.too_slow]
# Each example is a compilation. Derandomized: a failure is one for everybody.
FEW = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=SLOW)
# Divergences in closed form, for the quadratic model.
WITH_KL = [name for name in CASES if not name.startswith(("student-t", "exponential"))]


@st.composite
def problems(draw, names=tuple(CASES), dtypes=(jnp.float32, jnp.float64)):
    """A network of up to two hidden layers, its head and batch, and two vectors."""
    case, dtype = CASES[draw(st.sampled_from(names))], draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    hidden = draw(st.lists(st.integers(1, 5), max_size=2))
    widths = [draw(st.integers(1, 4)), *hidden, case.size]
    bias, axes = draw(st.booleans()), draw(st.sampled_from([(1,), (5,), (2, 3)]))
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)

    def layers():
        pairs = itertools.pairwise(widths)
        return [{"w": array(i, o) / i**0.5, **({"b": array(o)} if bias else {})} for i, o in pairs]

    def model_fn(params, x):
        for number, layer in enumerate(params):
            x = x @ layer["w"] + layer.get("b", 0)
            x = jnp.tanh(x) if number < len(params) - 1 else x
        return x.reshape(*x.shape[:-1], *case.event_shape)

    weights = None
    if draw(st.booleans()):
        weights = jnp.asarray(rng.uniform(0.1, 2.0, axes), dtype)
        weights = weights * jnp.asarray(rng.random(axes) < 0.7, dtype)
        weights = weights.at[(0,) * len(axes)].set(1)
    options = {"weights": weights}
    problem = model_fn, case.head, layers(), array(*axes, widths[0])
    return problem, options, layers(), layers(), draw(st.integers(1, 6))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@FEW
@given(problems())
def test_products_are_linear_symmetric_positive_and_the_same_in_chunks(drawn):
    (model_fn, head, params, x), options, u, v, chunk_size = drawn

    @quick_jit
    def found(params, x, options, u, v):
        F = fvp.fisher(model_fn, head, params, x, **options)
        chunked = fvp.fisher(model_fn, head, params, x, **options, chunk_size=chunk_size)
        both = jax.tree.map(lambda a, b: 2 * a - 3 * b, u, v)
        return F @ u, F @ v, F @ both, chunked @ u, F.quadratic_form(u)

    results = found(params, x, options, u, v)
    Fu, Fv, F_both, chunked = map(flat, results[:4])
    u, v, form = flat(u), flat(v), float(results[4])
    eps = float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)
    scale = max(np.linalg.norm(Fu), np.linalg.norm(Fv), 1e-30)
    assert abs(u @ Fv - v @ Fu) <= 100 * eps * scale * max(np.linalg.norm(u), np.linalg.norm(v))
    assert form >= 0
    assert abs(u @ Fu - form) <= 100 * eps * np.linalg.norm(u) * scale
    assert np.linalg.norm(F_both - 2 * Fu + 3 * Fv) <= 100 * eps * scale
    assert np.linalg.norm(chunked - Fu) <= 100 * eps * scale


@FEW
@given(problems(names=WITH_KL, dtypes=(jnp.float64,)))
def test_the_divergence_of_a_small_step_is_half_its_quadratic_form(drawn):
    (model_fn, head, params, x), options, u, _, _ = drawn
    size = 1e-5

    @quick_jit
    def found(params, x, options, u):
        moved = jax.tree.map(lambda p, d: p + size * d, params, u)
        divergence = fvp.kl_divergence(model_fn, head, params, moved, x, **options)
        return divergence, fvp.fisher(model_fn, head, params, x, **options).quadratic_form(u)

    divergence, form = map(float, found(params, x, options, u))
    assert abs(divergence - 0.5 * size**2 * form) <= 1e-3 * 0.5 * size**2 * form + 1e-17
