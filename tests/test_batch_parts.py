"""Batches whose leaves hold parts of it, such as points inside and at the edge of a domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import product_matrix, quick_jit, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

rng = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(rng.normal(size=(2, 6))),
    "b": jnp.asarray(rng.normal(size=6)),
    "v": jnp.asarray(rng.normal(size=(6, 1))),
}
POINTS = jnp.asarray(rng.uniform(size=(14, 2)))
WEIGHTS = jnp.asarray(rng.uniform(0.2, 2.0, 14)).at[3].set(0)
HEAD = fvp.Gaussian()


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def concatenated(params, parts):
    return jnp.concatenate([network(params, part) for part in parts])


def jitted(params, parts):
    return jax.jit(concatenated)(params, parts)


def mapped(params, parts):
    point = lambda x: network(params, x[None])[0]
    return jnp.concatenate([jax.lax.map(point, part) for part in parts])


def padded(params, parts):
    a, b = (network(params, part) for part in parts)
    return jnp.pad(a, ((0, len(b)), (0, 0))) + jnp.pad(b, ((len(a), 0), (0, 0)))


def sliced(params, parts):
    whole = jnp.concatenate(parts)
    return jnp.concatenate([network(params, whole[:5]), network(params, whole[5:])])


def columns(params, parts):
    return jnp.concatenate([network(params, parts[0].T), network(params, parts[1].T)])


SPLITS = {"unequal": 9, "equal": 7, "one point": 1}


@pytest.mark.each_value
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("model", [concatenated, jitted, mapped, padded, sliced, columns])
def test_parts_are_served_as_the_whole(model, split):
    parts, axes = (POINTS[:split], POINTS[split:]), 0
    if model is columns:
        parts, axes = tuple(part.T for part in parts), 1
    options = {"weights": WEIGHTS}
    vector = jax.tree.map(lambda p: p + 1, PARAMS)

    def found(model, batch, axes):
        F = fvp.fisher(model, HEAD, PARAMS, batch, **options, batch_axes=axes)
        results = [F.dense(), product_matrix(F), fvp.solve_dual(F, vector, 1e-2)]
        if axes == 0:
            results.append(fvp.fisher_diagonal(model, HEAD, PARAMS, batch, **options))
            for sharing in ("expand", "reduce"):
                K = fvp.kfac(model, HEAD, PARAMS, batch, **options, weight_sharing=sharing)
                results += [K @ vector, K.solve(vector, 0.1)]
        return [ravel_pytree(x)[0] for x in results]

    parted = quick_jit(lambda batch: found(model, batch, axes))(parts)
    whole = quick_jit(lambda batch: found(network, batch, 0))(POINTS)
    for a, b in zip(parted, whole[: len(parted)], strict=True):
        assert relative_error(a, b) < 1e-10


def test_three_parts_one_of_them_of_targets_alone():
    """Zeros of no example, and a leaf that is used twice in its own part."""

    def model(params, batch):
        inside, left, right = batch["inside"], batch["left"], batch["right"]
        periodic = network(params, left) - network(params, right)
        return jnp.concatenate([network(params, inside), periodic, jnp.zeros((3, 1))])

    batch = {"inside": POINTS[:6], "left": POINTS[6:10], "right": POINTS[10:]}
    F = fvp.fisher(model, HEAD, PARAMS, batch)
    assert relative_error(F.dense(), product_matrix(F)) < 1e-12
    diagonal = fvp.fisher_diagonal(model, HEAD, PARAMS, batch)
    assert relative_error(ravel_pytree(diagonal)[0], jnp.diag(product_matrix(F))) < 1e-12


def crossed(params, parts):
    """Every output reads a point of either part."""
    a, b = (network(params, part) for part in parts)
    return jnp.concatenate([a + b, a - b])


def shifted(params, parts):
    """Differences of neighbours."""
    z = concatenated(params, parts)
    return z - jnp.concatenate([z[1:], z[:1]])


def repeated(params, parts):
    return jnp.concatenate([network(params, parts[0]), network(params, parts[0]) * parts[1][:, :1]])


@pytest.mark.parametrize("model", [crossed, shifted, repeated])
def test_examples_that_meet_are_noticed(model):
    batch = (POINTS[:7], POINTS[7:])
    F = fvp.fisher(model, HEAD, PARAMS, batch)
    assert relative_error(F.dense(), product_matrix(F)) < 1e-12
    with pytest.raises(ValueError, match="fallback"):
        fvp.fisher_diagonal(model, HEAD, PARAMS, batch)


@pytest.mark.parametrize(("inside", "edge"), [(5, 1), (5, 2), (4, 4), (1, 5)])
def test_a_part_that_does_not_read_its_points(inside, edge):
    """The slope of a straight line is the same everywhere: a parameter, as often as it is asked."""
    batch, w = {"inside": jnp.ones(inside), "edge": jnp.linspace(0, 0.5, edge)}, jnp.ones(2)

    def model(w, batch):
        u = lambda x: w[0] + w[1] * x
        return jnp.concatenate([jax.vmap(jax.grad(u))(batch["inside"]), u(batch["edge"])])

    arguments = model, fvp.Gaussian(event_ndim=0), w, batch
    jacobian = jax.jacobian(model)(w, batch)
    dense = jacobian.T @ jacobian / (inside + edge)
    assert relative_error(fvp.fisher(*arguments).dense(), dense) < 1e-14
    assert relative_error(fvp.fisher_diagonal(*arguments), jnp.diag(dense)) < 1e-14
    solution = fvp.solve_dual(fvp.fisher(*arguments), w, 0.1)
    assert relative_error(solution, jnp.linalg.solve(dense + 0.1 * jnp.eye(2), w)) < 1e-13


# Residuals of several kinds ----------------------------------------------------------------------


def kinds(params, parts):
    """Two of the equations, for two components each, and one for the edge."""
    jacobian = jax.vmap(jax.jacfwd(lambda x: network(params, x[None])[0]))(parts[0])[:, 0]
    return {"equations": jacobian, "edge": network(params, parts[1])[:, 0] - 1}


@pytest.mark.parametrize("weights", [None, {"edge": 10.0}, {"edge": 0.0, "equations": 2.0}])
def test_the_mean_of_stacked_residuals_is_the_sum_of_their_means(weights):
    parts, head = (POINTS[:9], POINTS[9:]), fvp.Gaussian(event_ndim=0)
    model = lambda params, parts: fvp.stack_residuals(kinds(params, parts), weights)
    flat, unravel = ravel_pytree(PARAMS)

    def loss(flat):
        weight = {"equations": 1.0, "edge": 1.0} | (weights or {})
        found = kinds(unravel(flat), parts)
        return sum(weight[k] * 0.5 * (found[k] ** 2).sum() / len(found[k]) for k in found)

    F = fvp.fisher(model, head, PARAMS, parts)
    assert F.output.shape == (23,)
    _, gradient = F.value_and_grad(jnp.zeros(23))
    assert relative_error(ravel_pytree(gradient)[0], jax.grad(loss)(flat)) < 1e-13
    jacobian = jax.jacobian(lambda flat: model(unravel(flat), parts))(flat)
    assert relative_error(F.dense(), jacobian.T @ jacobian / 23) < 1e-13
    solution = fvp.solve_dual(F, gradient, 1e-2, targets=jnp.zeros(23))
    assert (
        relative_error(
            ravel_pytree(F @ solution)[0] + 1e-2 * ravel_pytree(solution)[0],
            ravel_pytree(gradient)[0],
        )
        < 1e-11
    )


@pytest.mark.parametrize(
    ("residuals", "weights", "match"),
    [
        ({}, None, "at least one kind"),
        ({"a": jnp.ones(3)}, {"b": 1.0}, r"expected those of \['a'\], got \['b'\]"),
        ({"a": jnp.ones(())}, None, r"for 'a', got shape \(\)"),
        ({"a": jnp.ones((0, 2))}, None, r"for 'a', got shape \(0, 2\)"),
    ],
)
def test_residuals_that_are_none_are_named(residuals, weights, match):
    with pytest.raises(ValueError, match=match):
        fvp.stack_residuals(residuals, weights)


def test_stacked_residuals_cost_a_jacobian_and_a_product():
    """Burgers' equation with its edge, as often as a hand-written J^T J by vmap(grad)."""
    inside, edge = jnp.asarray(rng.uniform(size=(640, 2))), jnp.asarray(rng.uniform(size=(120, 2)))
    shapes = [(2, 24), (24,), (24, 24), (24,), (24, 1)]
    params = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    flat, unravel = ravel_pytree(params)

    def u(params, x):
        w, b, v, c, out = params
        return (jnp.tanh(jnp.tanh(jnp.stack([x[0], x[1]]) @ w + b) @ v + c) @ out)[0]

    def burgers(params, x):
        value, (t, s) = jax.value_and_grad(u, 1)(params, x)
        return t + value * s - 0.01 * jax.hessian(u, 1)(params, x)[1, 1]

    over = lambda residual: jax.vmap(residual, (None, 0))

    def model(params, batch):
        return jnp.concatenate([over(burgers)(params, batch[0]), over(u)(params, batch[1])])[
            :, None
        ]

    def by_hand(flat, batch):
        rows = [
            over(jax.grad(lambda flat, x, r=r: r(unravel(flat), x)))(flat, x)
            for r, x in zip((burgers, u), batch, strict=True)
        ]
        rows = jnp.concatenate(rows)
        return rows.T @ rows / len(rows)

    batch = (inside, edge)
    ours = jax.jit(lambda params, batch: fvp.fisher(model, HEAD, params, batch).dense())
    theirs = jax.jit(by_hand).lower(flat, batch).compile()
    ours = ours.lower(params, batch).compile()
    assert relative_error(ours(params, batch), theirs(flat, batch)) < 1e-12
    flops = lambda program: program.cost_analysis()["flops"]
    assert flops(ours) < 1.5 * flops(theirs)
