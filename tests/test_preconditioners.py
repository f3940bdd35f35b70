"""Preconditioners: against dense inverses, and by the iterations they save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True
DAMPING = 1e-4
TREE = {"a": jnp.zeros((8, 10)), "b": jnp.zeros(40)}
FLAT, UNRAVEL = ravel_pytree(TREE)


def matrix(eigenvalues):
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(FLAT.size, FLAT.size)))
    return jnp.asarray(q * eigenvalues @ q.T)


def operator(dense):
    return lambda v: UNRAVEL(dense @ ravel_pytree(v)[0])


def iterations(A, M):
    rhs = UNRAVEL(jnp.asarray(np.random.default_rng(1).normal(size=FLAT.size)))
    _, info = fvp.cg(A, rhs, damping=DAMPING, M=M, tol=1e-3)
    assert bool(info.converged)
    return int(info.iterations)


def test_nystrom_of_full_rank_is_the_exact_inverse():
    dense = matrix(np.linspace(1, 3, FLAT.size))
    A = operator(dense)
    M = fvp.nystrom_preconditioner(A, TREE, DAMPING, jax.random.key(0), rank=FLAT.size)
    v = UNRAVEL(jnp.linspace(-1, 1, FLAT.size))
    expected = (1 + DAMPING) * np.linalg.solve(
        dense + DAMPING * np.eye(FLAT.size), ravel_pytree(v)[0]
    )
    np.testing.assert_allclose(ravel_pytree(M.mv(v))[0], expected, rtol=1e-8)
    assert iterations(A, M) == 1


def test_nystrom_of_low_rank_cuts_iterations_where_the_spectrum_decays():
    A = operator(matrix(2.0 ** -np.arange(FLAT.size)))
    M = fvp.nystrom_preconditioner(A, TREE, DAMPING, jax.random.key(0), rank=25)
    assert 3 * iterations(A, M) <= iterations(A, None)


def test_nystrom_is_symmetric_positive_definite_and_crosses_jit():
    A = operator(matrix(2.0 ** -np.arange(FLAT.size)))
    build = jax.jit(lambda key: fvp.nystrom_preconditioner(A, TREE, DAMPING, key, rank=10))
    M = build(jax.random.key(0))
    dense = jax.vmap(lambda e: ravel_pytree(M.mv(UNRAVEL(e)))[0])(jnp.eye(FLAT.size))
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > 0


def test_nystrom_of_zero_is_finite():
    zero = lambda v: jax.tree.map(jnp.zeros_like, v)
    M = fvp.nystrom_preconditioner(zero, TREE, 0.1, jax.random.key(0), rank=5)
    assert np.all(np.isfinite(ravel_pytree(M.mv(UNRAVEL(FLAT + 1)))[0]))


def test_diagonal_cuts_iterations_on_a_badly_scaled_matrix():
    scale = jnp.asarray(10.0 ** np.linspace(0, 3, FLAT.size))
    dense = scale[:, None] ** 0.5 * matrix(np.linspace(1, 2, FLAT.size)) * scale**0.5
    A = operator(dense)
    for exponent in (0.75, 1.0):
        M = fvp.diagonal_preconditioner(UNRAVEL(jnp.diagonal(dense)), DAMPING, exponent)
        assert 3 * iterations(A, M) <= iterations(A, None)


def test_rank_must_be_a_positive_integer():
    with pytest.raises(ValueError, match="rank"):
        fvp.nystrom_preconditioner(lambda v: v, TREE, 0.1, jax.random.key(0), rank=0)
