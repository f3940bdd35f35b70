"""Memory and flops of compiled programs; nothing here is executed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import fvp

COMPILE_QUICKLY = True  # flops and memory are settled before LLVM's optimizations

HEAD, ITERATIONS = fvp.Softmax(), 10
SIZES = (784, 512, 512, 10)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def total_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- Chunks -----------------------------------------------------------------------------------

PARAMS = [(array(i, o), array(o)) for i, o in itertools.pairwise(SIZES)]


def mlp(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def build(chunk_size, params, x):
    return fvp.fisher(mlp, HEAD, params, x, chunk_size=chunk_size)


def solve(chunk_size, params, x, rhs):
    operator = build(chunk_size, params, x)
    return fvp.cg(operator, rhs, damping=0.1, tol=0, maxiter=ITERATIONS)


@functools.cache
def solve_program(rows, chunk_size):
    compute = functools.partial(solve, chunk_size)
    return jax.jit(compute).lower(PARAMS, array(rows, SIZES[0]), PARAMS).compile()


def solve_bytes(rows, chunk_size):
    return solve_program(rows, chunk_size).memory_analysis().temp_size_in_bytes


def solve_flops(rows, chunk_size):
    """Of all iterations; the compiler's own count is that of one pass through every loop."""
    x = array(rows, SIZES[0])
    flops = lambda program: program.cost_analysis().get("flops", 0.0)
    once = flops(jax.jit(functools.partial(build, chunk_size)).lower(PARAMS, x).compile())
    passes = ITERATIONS * (1 if chunk_size is None else rows // chunk_size)
    return once + passes * (flops(solve_program(rows, chunk_size)) - once)


def gradient_flops(rows):
    def loss(params, x, y):
        return HEAD.nll(mlp(params, x), y).mean()

    args = PARAMS, array(rows, SIZES[0]), array(rows, dtype=jnp.int32)
    return jax.jit(jax.grad(loss)).lower(*args).compile().cost_analysis()["flops"]


def test_chunks_bound_the_temporary_memory_of_a_solve():
    assert solve_bytes(1024, 256) <= 0.65 * solve_bytes(1024, None)


def test_memory_is_flat_in_the_batch_at_fixed_chunk_size():
    assert solve_bytes(8 * 1024, 256) <= 1.01 * solve_bytes(1024, 256)


def test_chunks_cost_at_most_half_as_much_again():
    # Two linear passes for each iteration, as a check that all iterations are counted.
    whole = solve_flops(1024, None)
    assert 1.1 * ITERATIONS < whole / gradient_flops(1024) < 1.3 * ITERATIONS
    assert whole < solve_flops(1024, 256) <= 1.5 * whole


def test_a_solve_holds_four_vectors_beside_its_solution():
    # Residual, direction, product, next residual; another means that XLA copies one in every pass.
    def solve(matrix, rhs):
        return fvp.cg(lambda v: matrix @ v, rhs, damping=0.1, tol=0, maxiter=ITERATIONS)

    rhs = array(64, 4096)
    assert temporary_bytes(solve, array(64, 64), rhs) <= 4.05 * total_bytes(rhs)


# --- Large vocabularies -----------------------------------------------------------------------

VOCABULARY, WIDTH, ROWS = 32_768, 8, 128
LOGITS_BYTES = 4 * VOCABULARY * ROWS
TABLE = {"hidden": array(WIDTH, WIDTH), "out": array(WIDTH, VOCABULARY)}
EXAMPLES = array(ROWS, WIDTH), array(ROWS, dtype=jnp.int32), array(ROWS)


def language_model(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def operator(curvature, params, x, y, w):
    if curvature == "identity":  # J^T J: the linearisation and nothing between
        return fvp.fisher(language_model, fvp.Gaussian(), params, x, weights=w)
    targets = () if curvature == "fisher" else (y,)
    return getattr(fvp, curvature)(language_model, HEAD, params, x, *targets, weights=w)


def product(curvature, params, v, x, y, w):
    return operator(curvature, params, x, y, w) @ v


def vocabulary_solve(curvature, params, rhs, x, y, w):
    built = operator(curvature, params, x, y, w)
    return fvp.cg(built, rhs, damping=0.1, tol=0, maxiter=ITERATIONS)


@functools.cache
def bytes_in_jit(compute, curvature):
    return temporary_bytes(functools.partial(compute, curvature), TABLE, TABLE, *EXAMPLES)


every_curvature = pytest.mark.parametrize("curvature", ["fisher", "ggn", "empirical_fisher"])


@every_curvature
@pytest.mark.parametrize("compute", [product, vocabulary_solve])
def test_softmax_scaling_holds_at_most_two_extra_logits_arrays(curvature, compute):
    extra = bytes_in_jit(compute, curvature) - bytes_in_jit(compute, "identity")
    assert 0 <= extra <= 2.01 * LOGITS_BYTES


@every_curvature
def test_operators_hold_at_most_two_logits_arrays_beside_the_linearisation(curvature):
    held = jax.eval_shape(functools.partial(operator, curvature), TABLE, *EXAMPLES)
    kept = jax.eval_shape(
        lambda params, x: jax.vjp(lambda p: language_model(p, x), params), TABLE, EXAMPLES[0]
    )
    assert total_bytes(kept) < total_bytes(held) <= total_bytes(kept) + 2.01 * LOGITS_BYTES
