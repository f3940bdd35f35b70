"""Guarded inverses of semi-definite matrices against dense float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fvp.factorization import inverse_semidefinite


def gram(size, rows, batch=(), dtype=np.float64):
    x = np.random.default_rng(size).normal(size=(*batch, rows, size))
    return np.asarray(np.swapaxes(x, -2, -1) @ x / rows, dtype)


@pytest.mark.parametrize("size", [1, 7, 300, 301, 650])
def test_inverse_is_that_of_the_damped_matrix(size):
    """Below and above the size from which it is put together from blocks."""
    matrix, damping = gram(size, size + 3, (2,)), np.array([0.5, 1e-3])
    inverse = np.asarray(inverse_semidefinite(jnp.asarray(matrix), jnp.asarray(damping)))
    expected = np.linalg.inv(matrix + damping[:, None, None] * np.eye(size))
    np.testing.assert_allclose(inverse, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_array_equal(inverse, np.swapaxes(inverse, -2, -1))


@pytest.mark.parametrize("size", [7, 650])
def test_matrix_that_rounding_makes_indefinite_gets_more_damping(size):
    matrix = gram(size, 3, dtype=np.float32)
    matrix -= 1e-7 * np.eye(size, dtype=np.float32)
    assert not np.isfinite(np.asarray(jnp.linalg.cholesky(jnp.asarray(matrix)))).all()
    inverse = np.asarray(inverse_semidefinite(jnp.asarray(matrix), jnp.float32(0)))
    more = np.finfo(np.float32).eps * size * matrix.diagonal().max()
    values, vectors = np.linalg.eigh(matrix.astype(float) + more * np.eye(size))
    assert values.min() > 0
    # Directions that the matrix does not see are damped alone; those that it sees are inverted, up
    # to the rounding of entries that the others make large.
    seen, rounding = vectors[:, -3:], np.finfo(np.float32).eps / 2 * np.abs(inverse).max()
    np.testing.assert_allclose(seen.T @ inverse @ seen, np.diag(1 / values[-3:]), atol=rounding)
    unseen = vectors[:, :-3]
    largest = np.linalg.eigvalsh(unseen.T @ inverse @ unseen).max()
    assert 0.1 / more < largest < 10 / values[:-3].min()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_matrix_that_is_not_finite_never_gets_in(bad):
    matrix = gram(5, 8)
    matrix[1, 2] = bad
    inverse = inverse_semidefinite(jnp.asarray(matrix), jnp.asarray(0.25))
    np.testing.assert_allclose(inverse, 4 * np.eye(5), rtol=1e-12)
