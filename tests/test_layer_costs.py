"""What layer capture costs, in gradients of a 784-512-512-10 network at batch 256."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvp

COMPILE_QUICKLY = True  # flops and memory are settled before LLVM's optimizations

HEAD = fvp.Softmax()


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
    params = [(draw(a, b), draw(b)) for a, b in itertools.pairwise([784, 512, 512, 10])]
    return params, draw(256, 784), jnp.zeros(256, jnp.int32)


def model_fn(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def compiled(function):
    params, x, _ = problem()
    return jax.jit(function).lower(params, x).compile()


def flops(function):
    return compiled(function).cost_analysis()["flops"]


@functools.cache
def gradient_flops():
    _, _, y = problem()
    return flops(jax.grad(lambda params, x: HEAD.nll(model_fn(params, x), y).mean()))


@pytest.mark.parametrize(("key", "most"), [(None, 6), (jax.random.key(0), 2.2)])
def test_the_diagonal_costs_a_few_gradients(key, most):
    diagonal = lambda params, x: fvp.fisher_diagonal(model_fn, HEAD, params, x, key=key)
    assert flops(diagonal) <= most * gradient_flops()


@pytest.mark.parametrize(("num_samples", "most"), [(1, 8), (None, 12)])
def test_a_step_of_kfac_costs_at_most_eight_gradients_and_twelve_with_exact_factors(
    num_samples, most
):
    tx = fvp.scale_by_kfac(model_fn, HEAD, num_samples=num_samples)
    _, _, y = problem()
    step = lambda p, x: tx.update(p, tx.init(p), p, batch=x, targets=y)
    assert flops(step) <= most * gradient_flops()


def test_a_dual_solve_costs_at_most_sixty_gradients_and_a_gibibyte():
    solve = lambda p, x: fvp.solve_dual(fvp.fisher(model_fn, HEAD, p, x), p, 1e-3)
    program = compiled(solve)
    assert program.memory_analysis().temp_size_in_bytes < 2**30
    assert program.cost_analysis()["flops"] <= 60 * gradient_flops()
