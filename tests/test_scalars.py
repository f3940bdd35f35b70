"""Records of scalars in one array."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import fvp
from fvp.scalars import Scalars


class Pair(Scalars):
    """Two numbers."""

    first: Array
    second: Array


def test_fields_are_one_array_and_read_by_name():
    pair = Pair(first=1, second=jnp.float64(2))
    assert (pair.first, pair.second) == (1, 2)
    [leaf] = jax.tree.leaves(pair)
    assert leaf.dtype == jnp.float32
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path({"a": pair})[0][0]) == (
        "['a'].values"
    )
    assert Pair.zeros() == Pair(first=0, second=0) != pair
    assert pair._replace(second=3) == Pair(first=1, second=3)
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert "first, second" in repr(pair)


def test_fields_that_are_missing_or_unknown_are_refused():
    with pytest.raises(TypeError, match="third"):
        Pair.zeros()._replace(third=1)
    with pytest.raises(KeyError, match="second"):
        Pair(first=1)


def test_stacked_records_have_stacked_fields():
    pairs = jax.vmap(lambda x: Pair(first=x, second=2 * x))(jnp.arange(3.0))
    np.testing.assert_array_equal(pairs.second, [0, 2, 4])
    swapped = jax.jit(jax.vmap(lambda p: p._replace(first=p.second)))(pairs)
    np.testing.assert_array_equal(swapped.first, [0, 2, 4])


def test_a_state_has_few_arrays_beside_those_like_the_parameters():
    # Each costs some microseconds in every call of a compiled step.
    tx = fvp.natural_gradient(1.0, lambda w, x: x @ w, fvp.Softmax())
    leaves = jax.tree.leaves(tx.init(jnp.zeros(5)))
    assert sum(leaf.shape != (5,) for leaf in leaves) <= 17
