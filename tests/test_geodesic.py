"""Bent steps: the correction against dense float64 algebra, and what it is good for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import CASES, mlp, parameters, rarely, reference
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

DAMPING = 1.0


@functools.cache
def problem(name):
    case, rng = CASES[name], np.random.default_rng(0)
    model_fn, params = mlp(case.event_shape), parameters(rng, case.size)
    x = jnp.asarray(rng.normal(size=(5, 2)))
    targets, weights = case.targets(rng, (5,)), jnp.asarray(rng.uniform(size=5)).at[1].set(0)
    values = reference(case, model_fn, params, x, targets, weights)
    return case.head, model_fn, params, x, targets, weights, values


@functools.cache
def bent_step(name):
    """d and c of the path by dense solves, with J and z'' from nested differentiation."""
    head, model_fn, params, x, _, weights, values = problem(name)
    flat, unravel = ravel_pytree(params)
    model = lambda flat: model_fn(unravel(flat), x)
    damped = values["fisher"] + DAMPING * np.eye(flat.size)
    d = np.linalg.solve(damped, values["gradient"])
    w = (weights / weights.sum()).reshape(-1, *(1,) * head.event_ndim)

    @jax.jit
    def pulled_bend(flat, d):
        slope = lambda flat: jax.jvp(model, (flat,), (d,))[1]
        _, bend = jax.jvp(slope, (flat,), (d,))
        weighted = w * head.fisher(model(flat), bend)
        return jnp.tensordot(weighted, jax.jacobian(model)(flat), weighted.ndim)

    return d, np.linalg.solve(damped, pulled_bend(flat, jnp.asarray(d)))


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("softmax", "cg"),
        rarely("sigmoid", "cg"),
        ("gaussian", "cg"),
        rarely("softmax", "dual"),
        ("gaussian", "dense"),
    ],
)
def test_the_correction_takes_back_the_bend_of_the_outputs(name, solver):
    head, model_fn, params, x, targets, weights, values = problem(name)
    d, c = bent_step(name)
    assert np.linalg.norm(c) < 0.75 * np.linalg.norm(d)  # else it would not be taken
    options = {"damping": DAMPING, "solver": solver, "tol": 1e-13, "maxiter": 300}
    tx = fvp.natural_gradient(0.5, model_fn, head, geodesic=True, **options)
    gradient = ravel_pytree(params)[1](jnp.asarray(values["gradient"]))
    data = {"batch": x, "targets": targets, "weights": weights}
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, **data)
    expected = -(0.5 * d + 0.125 * c)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-8, atol=1e-10)


def test_a_linear_model_has_no_correction():
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.normal(size=s)) for s in ((6, 3), (6, 2), (3, 2)))
    model_fn, head = lambda w, x: x @ w, fvp.Gaussian()
    gradient = jax.grad(lambda w: head.nll(model_fn(w, x), y).mean())(w)
    steps = []
    for geodesic in (False, True):
        tx = fvp.natural_gradient(1.0, model_fn, head, damping=0.1, geodesic=geodesic)
        steps.append(tx.update(gradient, tx.init(w), w, batch=x)[0])
    np.testing.assert_array_equal(*steps)


def test_a_correction_longer_than_the_direction_is_left_out():
    model_fn, head = lambda w, x: x * jnp.exp(9 * w), fvp.Gaussian()
    w, x, y = jnp.ones(1), jnp.ones((2, 1)), jnp.zeros((2, 1))
    gradient = jax.grad(lambda w: head.nll(model_fn(w, x), y).mean())(w)
    straight, bent = (
        fvp.natural_gradient(1.0, model_fn, head, damping=1e-3, geodesic=geodesic)
        for geodesic in (False, True)
    )
    expected, _ = straight.update(gradient, straight.init(w), w, batch=x)
    actual, _ = bent.update(gradient, bent.init(w), w, batch=x)
    np.testing.assert_array_equal(actual, expected)


def test_bent_steps_follow_the_valley_of_rosenbrock():
    """At most half as many as straight ones."""
    model_fn = lambda p, _: jnp.stack([p[:1], 10 * (p[1:] - p[:1] ** 2)], axis=1)
    start, batch, y = jnp.array([-1.2, 1.0]), jnp.zeros(1), jnp.array([[1.0, 0.0]])
    head = fvp.Gaussian()
    loss = jax.jit(lambda p: jnp.sum((model_fn(p, batch) - y) ** 2))
    gradient = jax.jit(jax.grad(lambda p: head.nll(model_fn(p, batch), y).mean()))

    def steps(geodesic):
        options = {"damping": 1e-9, "solver": "dense", "line_search": "loss"}
        tx = fvp.natural_gradient(1.0, model_fn, head, geodesic=geodesic, **options)
        params, state = start, tx.init(start)
        for count in range(1, 101):
            updates, state = tx.update(gradient(params), state, params, batch=batch, targets=y)
            params = optax.apply_updates(params, updates)
            if loss(params) < 1e-12:
                return count
        return np.inf

    assert steps(geodesic=True) <= 0.5 * steps(geodesic=False)


def test_what_holds_no_linearisation_is_an_error():
    head, model_fn, params, x, targets, _, values = problem("softmax")
    gradient = ravel_pytree(params)[1](jnp.asarray(values["gradient"]))
    tx = fvp.natural_gradient(1.0, model_fn, head, geodesic=True, chunk_size=2)
    with pytest.raises(ValueError, match="geodesic"):
        tx.update(gradient, tx.init(params), params, batch=x, targets=targets)


@pytest.mark.parametrize("solver", ["dense", "dual"])
def test_exact_solves_without_damping_stay_above_rounding(solver):
    """More parameters than residuals: without damping the system is singular."""
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.normal(size=s)) for s in ((3, 8), (3, 1), (8, 1)))
    model_fn, head = lambda w, x: x @ w, fvp.Gaussian()
    tx = fvp.natural_gradient(1.0, model_fn, head, solver=solver, line_search="loss")
    gradient = jax.grad(lambda w: head.nll(model_fn(w, x), y).mean())(w)
    updates, state = tx.update(gradient, tx.init(w), w, batch=x, targets=y)
    expected = np.linalg.lstsq(x, y - x @ w)[0]  # the least norm that solves it
    np.testing.assert_allclose(updates, expected, rtol=1e-5)
    # With labels no rounding outside the range is left that damping would have to hide: it is that
    # of the factorisation, of F in the dual solve, of its root in the dense one.
    eps, trace = np.finfo(float).eps, np.sum(np.square(x)) / 3
    level = {"dense": (8 * eps) ** 2, "dual": 8 * eps}[solver]
    np.testing.assert_allclose(state.damping, level * trace, rtol=1e-5)


def losses_of_searched_steps(model_fn, solver, params, batch, targets, count):
    """Before each of so many steps with nothing set but the line for exact ones."""
    loss = lambda params: 0.5 * jnp.mean((model_fn(params, batch) - targets) ** 2)
    tx = fvp.natural_gradient(
        1.0, model_fn, fvp.Gaussian(), solver=solver, line_search="loss", geodesic=True
    )

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, batch=batch, targets=targets)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, count)[1])
    return run(params)


@pytest.mark.parametrize(("name", "damping"), [("softmax", 1e-2), ("gaussian", 1.0)])
def test_corrections_of_a_searched_step_are_those_of_dense_solves(name, damping):
    """Of every length that is tried, with J and H at the start; the loss ends them."""
    head, model_fn, params, x, targets, weights, values = problem(name)
    flat, unravel = ravel_pytree(params)
    w = (weights / weights.sum()).reshape(-1, *(1,) * head.event_ndim)
    model = jax.jit(lambda flat: model_fn(unravel(jnp.asarray(flat)), x))
    nll = lambda z: head.nll(z, targets) @ (weights / weights.sum())
    start, jacobian = model(flat), np.asarray(jax.jacobian(model)(flat))
    inverse = np.linalg.inv(values["fisher"] + damping * np.eye(flat.size))
    d = inverse @ values["gradient"]
    change, before = jacobian @ d, nll(start)

    def tried(length):
        """The lowest loss of the corrected steps, and its step."""
        step, found = length * d, []
        for count in range(9):
            z = model(flat - step)
            if count > 0 and found and not nll(z) < min(loss for loss, _ in found):
                break
            if count > 0:
                found.append((nll(z), step))
            weighted = w * head.fisher(start, z - (start - length * change))
            more = inverse @ np.tensordot(weighted, jacobian, weighted.ndim)
            if count == 0 and np.linalg.norm(more) > 0.75 * np.linalg.norm(step):
                return np.inf, step
            step = step + more
        return min(found, key=lambda pair: pair[0])

    length, (loss, expected) = 1.0, tried(1.0)
    while not loss < before or tried(0.5 * length)[0] <= loss:
        length = 0.5 * length
        loss, expected = tried(length)
    options = {"damping": damping, "solver": "dense", "line_search": "loss", "geodesic": True}
    tx = fvp.natural_gradient(1.0, model_fn, head, **options)
    gradient = unravel(jnp.asarray(values["gradient"]))
    data = {"batch": x, "targets": targets, "weights": weights}
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, **data)
    bend = np.linalg.norm(expected - length * d)
    assert bend > 1e-3 * np.linalg.norm(d)  # or it would not be about corrections
    np.testing.assert_allclose(ravel_pytree(updates)[0], -expected, rtol=1e-7, atol=1e-9)


def test_where_no_length_will_do_damping_grows():
    """As after any step that failed, however short the last length is."""
    model_fn, head = lambda w, x: x @ w, fvp.Gaussian()
    x, y, w = jnp.eye(2), jnp.ones((2, 1)), jnp.zeros((2, 1))
    value_fn = lambda params, _: jnp.where(jnp.all(params == 0), 0.5, jnp.inf)
    options = {"solver": "dense", "line_search": "loss", "geodesic": True}
    tx = fvp.natural_gradient(1.0, model_fn, head, **options)
    gradient = jax.grad(lambda w: head.nll(model_fn(w, x), y).mean())(w)
    state, dampings = tx.init(w), []
    for _ in range(4):
        updates, state = tx.update(gradient, state, w, batch=x, value_fn=value_fn)
        assert not state.accepted
        np.testing.assert_array_equal(updates, 0)
        dampings.append(float(state.damping))
    assert dampings[2] == pytest.approx(30 * dampings[1])
    assert dampings[3] == pytest.approx(30 * dampings[2])


@pytest.mark.parametrize("solver", ["dense", "dual"])
def test_searched_bent_steps_read_no_example_of_no_weight(solver):
    head, model_fn, params, x, targets, weights, values = problem("gaussian")
    gradient = ravel_pytree(params)[1](jnp.asarray(values["gradient"]))
    options = {"damping": 1e-2, "solver": solver, "line_search": "loss", "geodesic": True}
    tx = fvp.natural_gradient(1.0, model_fn, head, **options)
    data = {"targets": targets, "weights": weights}
    assert weights[1] == 0
    updates = []
    for batch in (x, x.at[1].set(jnp.nan)):
        step, state = tx.update(gradient, tx.init(params), params, batch=batch, **data)
        assert state.accepted
        updates.append(ravel_pytree(step)[0])
    np.testing.assert_allclose(*updates, rtol=1e-8, atol=1e-12)


def test_searched_bent_steps_stay_within_a_bound_on_their_divergence():
    head, model_fn, params, x, targets, *_ = problem("softmax")
    options = {"solver": "dense", "line_search": "loss", "geodesic": True, "max_kl": 1e-3}
    tx = fvp.natural_gradient(1.0, model_fn, head, damping=1e-6, **options)
    loss = lambda params: head.nll(model_fn(params, x), targets).mean()
    updates, state = tx.update(
        jax.grad(loss)(params), tx.init(params), params, batch=x, targets=targets
    )
    after = optax.apply_updates(params, updates)
    divergence = head.kl(model_fn(params, x), model_fn(after, x)).mean()
    assert state.accepted
    assert 1e-5 < divergence <= 1.05e-3
    assert loss(after) < loss(params)


def test_a_first_step_is_no_longer_than_its_bend_allows():
    """BoxBOD of NIST's StRD: the whole undamped step lowers the loss, and ends where it is flat."""
    t = jnp.array([1.0, 2.0, 3.0, 5.0, 7.0, 10.0])
    targets = jnp.array([109.0, 149.0, 149.0, 191.0, 213.0, 224.0])[:, None]
    model_fn = lambda b, t: (b[0] * (1 - jnp.exp(-b[1] * t)))[:, None]
    losses = losses_of_searched_steps(model_fn, "dense", jnp.array([1.0, 1.0]), t, targets, 60)
    certified = 0.5 * 1.1680088766e3 / 6
    np.testing.assert_allclose(losses[-1], certified, rtol=1e-8)


@pytest.mark.parametrize("solver", ["dense", "dual"])
def test_residuals_of_a_differential_equation_fall_to_rounding(solver):
    """Poisson's equation, points inside and at the edge: ill-conditioned, so that damping shows."""
    rng = np.random.default_rng(0)
    inside, edge = jnp.asarray(rng.uniform(size=(40, 2))), rng.uniform(size=(16, 2))
    edge[np.arange(16), np.arange(16) % 2] = np.arange(16) // 2 % 2
    sines = jnp.prod(jnp.sin(np.pi * inside), axis=1)
    w, b, v = (jnp.asarray(rng.normal(size=s)) for s in ((2, 24), (24,), (24, 1)))

    def model_fn(params, batch):
        w, b, v = params
        u = lambda x: (jnp.tanh(x @ w + b) @ v)[0]
        laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(batch["inside"])
        return jnp.concatenate([laplacian, jax.vmap(u)(batch["edge"])])[:, None]

    batch = {"inside": inside, "edge": jnp.asarray(edge)}
    targets = jnp.concatenate([-2 * np.pi**2 * sines, jnp.zeros(16)])[:, None]
    losses = losses_of_searched_steps(model_fn, solver, (w, b, v / 5), batch, targets, 60)
    assert losses[-1] < 1e-12


def test_a_start_at_which_undamped_steps_are_far_too_long_is_left():
    """The heat equation: without damping 20 steps take the loss from 0.023 to 0.020."""
    rng = np.random.default_rng(1)
    inside, edge = jnp.asarray(rng.uniform(size=(150, 2))), rng.uniform(size=(50, 2))
    edge[::2, 0], edge[1::2, 1] = 0, np.arange(50)[1::2] // 2 % 2
    widths, params = (2, 32, 32, 32, 1), []
    for inputs, outputs in itertools.pairwise(widths):
        draw = lambda *shape, bound=inputs**-0.5: jnp.asarray(rng.uniform(-bound, bound, shape))
        params.append((draw(inputs, outputs), draw(outputs)))
    values = np.exp(-0.25 * np.pi**2 * edge[:, 0]) * np.sin(np.pi * edge[:, 1])
    batch = {"inside": inside, "edge": jnp.asarray(edge)}
    targets = jnp.concatenate([jnp.zeros(150), jnp.asarray(values)])[:, None]

    def u(params, x):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        return (x @ params[-1][0] + params[-1][1])[0]

    def model_fn(params, batch):
        at = functools.partial(u, params)
        residual = lambda x: jax.grad(at)(x)[0] - 0.25 * jax.hessian(at)(x)[1, 1]
        parts = jax.vmap(residual)(batch["inside"]), jax.vmap(at)(batch["edge"])
        return jnp.concatenate(parts)[:, None]

    losses = losses_of_searched_steps(model_fn, "dual", params, batch, targets, 25)
    assert losses[-1] < 1e-3 * losses[0]
