"""Derivatives of a whole batch at once, whose constants have a row for each point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import relative_error
from jax.flatten_util import ravel_pytree

import fvp
from fvp.tracing.capture import capture

COMPILE_QUICKLY = True

rng = np.random.default_rng(0)
HEAD = fvp.Gaussian(event_ndim=0)
PARAMS = {
    "w": jnp.asarray(rng.normal(size=(2, 6))),
    "b": jnp.asarray(rng.normal(size=6)),
    "v": jnp.asarray(rng.normal(size=(6, 1))),
}


def points(count):
    return jnp.asarray(np.random.default_rng(1).uniform(size=(count, 2)))


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def along(x, axis):
    return jnp.zeros_like(x).at[:, axis].set(1)


def by_tangents(params, x):
    """The sum of second derivatives by forward mode, twice."""

    def second(tangent):
        first = lambda x: jax.jvp(lambda x: network(params, x), (x,), (tangent,))[1]
        return jax.jvp(first, (x,), (tangent,))[1]

    return (second(along(x, 0)) + second(along(x, 1)))[:, 0]


def by_sums(params, x):
    """By gradients of sums over the points."""
    u = lambda a, b: network(params, jnp.stack([a, b], 1))[:, 0]
    first = lambda a, b: jax.grad(lambda a: u(a, b).sum())(a)
    return jax.grad(lambda a: first(a, x[:, 1]).sum())(x[:, 0]) + u(x[:, 0], x[:, 1])


def by_cotangents(params, x):
    """Forward over reverse."""
    gradient = lambda x: jax.vjp(lambda x: network(params, x), x)[1](jnp.ones((len(x), 1)))[0]
    return jax.jvp(gradient, (x,), (along(x, 0),))[1][:, 0]


def inside_and_edge(params, batch):
    inside, edge = batch
    return jnp.concatenate([by_tangents(params, inside), network(params, edge)[:, 0]])


def edge_and_inside(params, batch):
    edge, inside = batch
    return jnp.concatenate([network(params, edge)[:, 0], by_sums(params, inside)])


def sliced(params, x):
    return jnp.concatenate([by_sums(params, x[:4]), network(params, x[4:])[:, 0]])


def beside_a_table(params, x):
    """A constant as long as the batch that is none of its rows: positions of as many tokens."""
    table = jnp.cos(jnp.arange(2.0 * len(x))).reshape(-1, 2)
    tokens = jnp.tanh(x[:, None] * table) @ params["w"] + table @ params["w"] + params["b"]
    return jnp.sum(jnp.tanh(tokens) @ params["v"], axis=(1, 2))


SIX = points(6)  # as many as there are hidden units
CASES = {
    "tangents": (by_tangents, points(9)),
    "sums": (by_sums, points(9)),
    "cotangents": (by_cotangents, points(9)),
    "as wide as long": (by_tangents, SIX),
    "cotangents, as wide as long": (by_cotangents, SIX),
    "one point": (by_tangents, points(1)),
    "jitted": (jax.jit(by_tangents), points(9)),
    "inside and edge": (inside_and_edge, (points(7), points(4))),
    "equal parts": (inside_and_edge, (points(5), points(5))),
    "equal parts, the second inside": (edge_and_inside, (points(5), points(5))),
    "sliced": (sliced, points(11)),
    "a table": (beside_a_table, SIX),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_jacobian(name):
    model, x = CASES[name]
    jacobian = jax.jacobian(lambda p: model(p, x))(PARAMS)
    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(jacobian)
    count = len(rows)
    matrix, identity = rows.T @ rows / count, jnp.eye(rows.shape[1])
    operator = fvp.fisher(model, HEAD, PARAMS, x)
    assert relative_error(operator.dense(), matrix) < 1e-12
    gradient, unravel = jnp.asarray(rng.normal(size=rows.shape[1])), ravel_pytree(PARAMS)[1]
    solution, _ = ravel_pytree(fvp.solve_dual(operator, unravel(gradient), 1e-2))
    assert relative_error(solution, jnp.linalg.solve(matrix + 1e-2 * identity, gradient)) < 1e-10
    diagonal, _ = ravel_pytree(fvp.fisher_diagonal(model, HEAD, PARAMS, x))
    assert relative_error(diagonal, jnp.diagonal(matrix)) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_layers_serve_every_use(name):
    model, x = CASES[name]
    found = capture(model, HEAD, PARAMS, x)
    assert found.mixed is None
    assert not found.unmatched
