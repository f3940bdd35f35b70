"""Step control: adaptive damping, rejection, KL bounds, momentum, l2, against dense algebra."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import CASES, mlp, parameters, rarely, reference
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_diabetes

import fvp
from fvp.control import Outcome, Step
from fvp.control.line_search import halving_search
from fvp.control.searched import SearchedDamping
from fvp.solvers.budget import Budget

COMPILE_QUICKLY = True

SOLVED = {"tol": 1e-13, "maxiter": 200}
GENTLE = fvp.LevenbergMarquardt(initial=5.0)  # no first step of these tiny problems is rejected
HEADS = {"softmax": "softmax", "sigmoid": "sigmoid", "gaussian": "gaussian"}


def flatten(tree):
    return np.asarray(ravel_pytree(tree)[0])


class Problem:
    def __init__(self, name, rows=7):
        rng = np.random.default_rng(3)
        self.case = CASES[name]
        self.model_fn, self.head = mlp(self.case.event_shape), self.case.head
        self.params = parameters(rng, self.case.size)
        self.batch = jnp.asarray(rng.normal(size=(rows, 2)))
        self.targets = self.case.targets(rng, (rows,))
        self.flat, self.unravel = ravel_pytree(self.params)

    @functools.cached_property
    def dense(self):
        weights = jnp.ones(len(self.batch))
        arguments = self.case, self.model_fn, self.params, self.batch, self.targets, weights
        values = reference(*arguments)
        return np.asarray(values["fisher"]), np.asarray(values["gradient"])

    def loss(self, params, batch=None):
        batch = self.batch if batch is None else batch
        return jnp.mean(self.head.nll(self.model_fn(params, batch), self.targets))

    def step(self, tx, state=None, grads=None, **extra_args):
        state = tx.init(self.params) if state is None else state
        grads = self.unravel(self.dense[1]) if grads is None else grads
        data = {"batch": self.batch, "targets": self.targets, **extra_args}
        return tx.update(grads, state, self.params, **data)  # compiled once for each tx


@functools.cache
def problem(name="softmax"):
    return Problem(name)


@functools.cache
def adaptive(p, **options):
    """One object for each set of options: tests that share it share its program.

    Levenberg-Marquardt is named where nothing is: noise has tests of its own.
    """
    rule = {} if "line_search" in options else {"damping": fvp.LevenbergMarquardt()}
    return fvp.scale_by_fisher(p.model_fn, p.head, **{**rule, **options})


def metric(gradients):
    squares = 0
    for g in gradients:
        squares = 0.9 * squares + 0.1 * g**2
    d = (squares / squares.mean() + 1e-3) ** 0.625
    return np.diag(d / d.mean())


# The direction -----------------------------------------------------------------------------------


def test_first_damping_is_a_fraction_of_the_curvature_along_the_gradient():
    p = problem()
    F, g = p.dense
    updates, state = p.step(adaptive(p, damping=GENTLE, **SOLVED))
    strength = 5 * (g @ F @ g) / (g @ g)
    np.testing.assert_allclose(state.damping, strength, rtol=1e-5)
    expected = np.linalg.solve(F + float(state.damping) * metric([g]), g)
    np.testing.assert_allclose(flatten(updates), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_scale_of_parameters_does_not_matter(scale):
    """The same model in other units, params = scale * new_params: the same step."""
    p = problem()
    inner = lambda tree: jax.tree.map(lambda leaf: scale * leaf, tree)
    tx = fvp.scale_by_fisher(
        lambda params, x: p.model_fn(inner(params), x), p.head, damping=GENTLE, **SOLVED
    )
    params, grads = jax.tree.map(lambda leaf: leaf / scale, p.params), inner(p.unravel(p.dense[1]))
    data = {"batch": p.batch, "targets": p.targets}
    updates, state = jax.jit(lambda g: tx.update(g, tx.init(params), params, **data))(grads)
    expected, other = p.step(adaptive(p, damping=GENTLE, **SOLVED))
    np.testing.assert_allclose(scale * flatten(updates), flatten(expected), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(state.damping, scale**2 * other.damping, rtol=1e-4)


def test_spring_pulls_towards_the_decayed_old_direction():
    p = problem()
    F, g = p.dense
    tx = adaptive(p, damping=0.1, momentum=0.8, **SOLVED)
    first, state = p.step(tx)
    A = F + 0.1 * np.eye(len(g))
    old = np.linalg.solve(A, g)
    np.testing.assert_allclose(flatten(first), old, rtol=1e-8)
    second, _ = p.step(tx, state)
    np.testing.assert_allclose(flatten(second), np.linalg.solve(A, g + 0.08 * old), rtol=1e-8)


def test_momentum_may_be_a_schedule():
    p = problem()
    F, g = p.dense
    tx = adaptive(p, damping=0.1, momentum=lambda count: 0.4 * count, **SOLVED)
    first, state = p.step(tx)
    second, _ = p.step(tx, state)
    A = F + 0.1 * np.eye(len(g))
    np.testing.assert_allclose(
        flatten(second), np.linalg.solve(A, g + 0.04 * flatten(first)), rtol=1e-8
    )


def test_momentum_that_is_not_given_grows_under_noise():
    p = problem()
    _, state = p.step(adaptive(p))
    state = state._replace(count=jnp.int32(12))
    against = p.unravel(-p.dense[1])  # gradients do not agree
    as_default, after = p.step(adaptive(p), state, against)
    assert not fvp.LevenbergMarquardt().agrees(after.control)
    as_number, _ = p.step(adaptive(p, momentum=1 - 1 / (4 + 2)), state, against)
    np.testing.assert_allclose(flatten(as_default), flatten(as_number), rtol=1e-5, atol=1e-9)


def with_progress(state, **numbers):
    """The state of Levenberg and Marquardt's rule with these numbers."""
    return state._replace(progress=state.progress._replace(**numbers))


def test_momentum_that_is_not_given_is_bounded_and_full_where_gradients_agree():
    rule = fvp.LevenbergMarquardt()
    noisy = with_progress(rule.init(jnp.zeros(2)), seen=1)
    agreeing = with_progress(noisy, agreement=1)
    momentum = lambda state, count: float(rule.momentum(state, jnp.int32(count)))
    assert momentum(noisy, 0) == 0.75
    for state, count in ((noisy, 36), (noisy, 10**6), (agreeing, 0)):
        np.testing.assert_allclose(momentum(state, count), 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("agreement", "taken", "change"), [(1, 0, 0.25), (0, 0.3, 0.9), (0, 0.5, 0.99)]
)
def test_under_noise_damping_falls_fast_only_while_it_leaves_most_of_the_slope(
    agreement, taken, change
):
    rule = fvp.LevenbergMarquardt()
    numbers = jax.tree.map(jnp.float32, Step(2.0, 2.0 * taken, 1.0, 1.0))
    good = Outcome(jnp.float32(0), jnp.float32(0), jnp.array(False))
    state = with_progress(rule.init(jnp.zeros(2)), factor=1, agreement=agreement, seen=1)
    corrected = rule.correct(state, numbers, good, jnp.array(True))
    np.testing.assert_allclose(corrected.progress.factor, change, rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "rounding", "worse", "last_slope", "change"),
    [
        (0.04, 0.0, False, 1.0, 0.25),
        (-0.9, 0.0, False, 1.0, 0.25),
        (0.06, 0.0, False, 1.0, 1.0),
        (0.09, 0.0, False, 1.0, 1.0),
        (0.11, 0.0, False, 1.0, 2.0),
        (0.15, 0.07, False, 1.0, 1.0),  # rounding takes its part of the error
        (0.11, 1.5, False, 1.0, 1.0),  # and may hide all of it
        (0.15, 0.0, True, 1.0, 4.0),
        (0.0, 0.0, True, 1.0, 0.25),  # momentum climbed just as the model said
        (0.0, 0.0, True, 0.0, 4.0),  # there was none
        (np.nan, 0.0, True, 1.0, 4.0),
    ],
)
def test_damping_follows_the_error_of_the_model(error, rounding, worse, last_slope, change):
    """Over 1/2 s^T (A + damping) s, which is 1 here; gradients agree."""
    rule = fvp.LevenbergMarquardt()
    step = jax.tree.map(jnp.float32, Step(2.0, 1.0, 1.0, 1.0))
    outcome = Outcome(jnp.float32(error), jnp.float32(rounding), jnp.array(worse))
    numbers = {"factor": 1, "agreement": 1, "seen": 1, "slope": last_slope}
    state = with_progress(rule.init(jnp.zeros(2)), **numbers)
    corrected = rule.correct(state, step, outcome, jnp.array(not worse))
    np.testing.assert_allclose(corrected.progress.factor, change, rtol=1e-6)
    # What the next gradient is held to: the slope, and the part of it that the model leaves.
    progress = corrected.progress
    assert (progress.slope, progress.expected) == ((0, 0) if worse else (2, 0.5))
    for bound in (1e-30, 1e30):
        state = with_progress(state, factor=bound)
        extreme = rule.correct(state, step, outcome, jnp.array(not worse))
        expected = np.clip(bound * change, 1e-30, 1e30)
        np.testing.assert_allclose(extreme.progress.factor, expected, rtol=1e-6)


def test_gradients_that_fall_short_of_the_model_are_noise():
    rule = fvp.LevenbergMarquardt()
    state = with_progress(rule.init(jnp.zeros(2)), factor=3, slope=1, expected=0.8)
    last, gradient = jnp.array([1.0, 0.0]), jnp.array([-0.5, 2.0])  # keeps -0.5 of the slope
    norm, curvature = jnp.linalg.norm(gradient), lambda: jnp.float32(7)
    observation = fvp.Observation(jnp.int32(1), gradient, norm, last, curvature)
    for _ in range(4):
        state, damping = rule.propose(state, observation)
        assert not rule.noisy(state)
    np.testing.assert_allclose(damping, 3 * norm**0.5, rtol=1e-6)
    np.testing.assert_allclose(state.progress.seen, (1 - 0.9**4) / 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.progress.agreement, -0.5 * (1 - 0.9**4) / 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.progress.surprise, 1.3 * (1 - 0.9**4), rtol=1e-6)
    state, _ = rule.propose(state, observation)
    assert rule.noisy(state)  # 1.3 (1 - 0.9^5) > 0.5
    assert not rule.agrees(state)


def test_a_slope_below_the_range_of_floats_leaves_the_state_finite():
    rule = fvp.LevenbergMarquardt()
    step = jax.tree.map(jnp.float32, Step(0.0, 0.0, 1e-38, 1.0))
    good = Outcome(jnp.float32(0), jnp.float32(0), jnp.array(False))
    state = with_progress(rule.init(jnp.zeros(2)), factor=1)
    corrected = rule.correct(state, step, good, jnp.array(True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(corrected))
    assert corrected.progress.slope == corrected.progress.expected == 0


def test_quadratic_momentum_is_the_best_of_the_plane():
    p = problem()
    F, g = p.dense
    tx = adaptive(p, damping=0.1, momentum="quadratic", maxiter=2, tol=0.0)
    first, state = p.step(tx)
    plain, _ = p.step(adaptive(p, damping=0.1, maxiter=2, tol=0.0))
    np.testing.assert_allclose(flatten(first), flatten(plain), rtol=1e-8)  # no old step: m = 0
    second, state = p.step(tx, state, p.unravel(g[::-1]))
    fresh, _ = p.step(adaptive(p, damping=0.1, maxiter=2, tol=0.0), None, p.unravel(g[::-1]))
    basis = np.stack([flatten(fresh), flatten(first)], 1)
    A = basis.T @ (F + 0.1 * np.eye(len(g))) @ basis
    expected = basis @ np.linalg.solve(A, basis.T @ g[::-1])
    np.testing.assert_allclose(flatten(second), expected, rtol=1e-6, atol=1e-10)
    kl = 0.5 * expected @ F @ expected
    np.testing.assert_allclose(state.predicted_kl, kl, rtol=1e-5)


def test_l2_enters_gradient_curvature_and_trial():
    p = problem()
    F, g = p.dense
    theta = np.asarray(p.flat)
    updates, state = p.step(adaptive(p, damping=0.1, l2=0.3, **SOLVED))
    expected = np.linalg.solve(F + 0.4 * np.eye(len(g)), g + 0.3 * theta)
    np.testing.assert_allclose(flatten(updates), expected, rtol=1e-8)
    # The divergence is that of the outputs, of which the penalty knows nothing.
    np.testing.assert_allclose(state.predicted_kl, 0.5 * expected @ F @ expected, rtol=1e-6)
    # Along the step the loss with its penalty falls, although the loss alone may rise.
    heavy = adaptive(p, damping=GENTLE, l2=100.0, **SOLVED)
    updates, state = p.step(heavy)
    assert bool(state.accepted)
    assert np.linalg.norm(theta - flatten(updates)) < np.linalg.norm(theta)


# The trial ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", ["targets", "value_fn"])
def test_step_that_raises_the_loss_is_rejected(trial):
    p = problem()
    tx = fvp.natural_gradient(1e3, p.model_fn, p.head)
    # Counted with value_fn even where the targets would say otherwise.
    extra = {"targets": None, "value_fn": p.loss} if trial == "value_fn" else {}
    before = tx.init(p.params)
    updates, state = p.step(tx, before, **extra)
    assert not np.any(flatten(updates))
    assert not bool(state.accepted)
    assert float(state.predicted_kl) == 0
    assert not np.any(flatten(state.direction))
    damping = float(state.damping)
    for _ in range(3):
        updates, state = p.step(tx, state, **extra)
        if bool(state.accepted):
            break
        assert float(state.damping) == pytest.approx(4 * damping, rel=1e-5)
        damping = float(state.damping)


def test_learning_rate_is_part_of_the_trial():
    p = problem()

    @jax.jit
    def accepted(rate):
        return p.step(fvp.natural_gradient(rate, p.model_fn, p.head, damping=GENTLE))[1].accepted

    assert accepted(1.0)
    assert not accepted(1e4)


@pytest.mark.parametrize("form", ["labels", "no labels", "operator"])
def test_defaults_descend_whatever_update_is_given(form):
    p = problem()
    tx = adaptive(p)

    @jax.jit
    def step(params, state):
        F = fvp.fisher(p.model_fn, p.head, params, p.batch)
        value, grads = F.value_and_grad(p.targets)
        data = {
            "labels": {"batch": p.batch, "targets": p.targets},
            "no labels": {"batch": p.batch},
            "operator": {"operator": F},
        }[form]
        updates, state = tx.update(grads, state, params, **data)
        return jax.tree.map(jnp.subtract, params, updates), state, value

    params, state, values = p.params, tx.init(p.params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert max(values) <= (1 if form == "labels" else 3) * values[0]


@functools.cache
def six_steps():
    """One program for every fault: where the steps end, and of each whether it moved, and more."""
    p = problem()
    tx = adaptive(p, damping=GENTLE)

    def loss(params, x, w):
        nll = p.head.nll(p.model_fn(params, x), p.targets)
        return jnp.sum(jnp.where(w == 0, 0, w * nll)) / jnp.maximum(jnp.sum(w), 1e-30)

    def step(carry, inputs):
        params, state = carry
        x, w, zero = inputs
        grads = jax.tree.map(lambda g: jnp.where(zero, 0, g), jax.grad(loss)(params, x, w))
        before = params
        updates, state = tx.update(grads, state, params, batch=x, targets=p.targets, weights=w)
        params = jax.tree.map(jnp.subtract, params, updates)
        moved = ravel_pytree(params)[0] != ravel_pytree(before)[0]
        return (params, state), (jnp.any(moved), state.accepted, loss(params, p.batch, jnp.ones(7)))

    return jax.jit(lambda *inputs: jax.lax.scan(step, (p.params, tx.init(p.params)), inputs))


@pytest.mark.parametrize("fault", ["nan input", "inf input", "overflow", "zero gradient", "masked"])
def test_bad_batch_inside_scan_leaves_everything_alone(fault):
    p = problem()
    batches = jnp.stack([p.batch] * 6)
    weights, zero = jnp.ones((6, 7)), jnp.zeros(6, bool)
    if "input" in fault:
        batches = batches.at[2, 1].set(jnp.nan if "nan" in fault else jnp.inf)
    elif fault == "overflow":
        batches = batches.at[2].multiply(1e300)
    elif fault == "masked":
        weights = weights.at[2].set(0)
    else:
        zero = zero.at[2].set(True)
    (params, state), (moved, accepted, losses) = six_steps()(batches, weights, zero)
    if fault != "overflow":
        assert moved.tolist() == accepted.tolist() == [True, True, False, True, True, True]
    assert bool(moved[3:].all())
    assert losses[-1] < losses[1]
    assert np.all(np.isfinite(flatten(params)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_loss_that_overflows_rejects_the_step_and_raises_damping():
    p = problem()
    value_fn = lambda params, x: jnp.where(
        params["out"]["b"][0] == p.params["out"]["b"][0], 1.0, jnp.inf
    )
    updates, state = p.step(adaptive(p), value_fn=value_fn)
    assert not np.any(flatten(updates))
    assert not bool(state.accepted)
    _, after = p.step(adaptive(p), state, value_fn=value_fn)
    assert float(after.damping) == pytest.approx(4 * float(state.damping), rel=1e-5)


# The budget of CG --------------------------------------------------------------------------------


def follow(budget, ratio, steps, *, short, noisy=False):
    for _ in range(steps):
        budget = budget.observe(
            ratio * jnp.where(budget.gradient_norm > 0, budget.gradient_norm, 1)
        )
        budget = budget.correct(short=jnp.asarray(short), noisy=jnp.asarray(noisy))
    return budget


def test_budget_grows_where_cut_short_and_slow_and_shrinks_when_fast():
    start = Budget.first()
    assert follow(start, 0.75, 40, short=True).iterations == 11
    # The average of ratios of 1 passes .8 at the 17th; each step from there on adds a tenth.
    np.testing.assert_allclose(follow(start, 1.0, 21, short=True).limit, 11 * 1.1**5, rtol=1e-5)
    most = follow(start, 1.5, 80, short=True)  # a rise counts as no progress, not as less
    assert most.iterations == 110
    assert follow(most, 1.0, 40, short=False).iterations == 110
    np.testing.assert_allclose(follow(most, 0.5, 9, short=True).limit, 110 / 1.1**5, rtol=1e-5)
    assert follow(most, 0.5, 60, short=False).iterations == 11


def test_budget_shrinks_to_two_where_noise_leads_and_comes_back():
    least = follow(Budget.first(), 1.0, 20, short=True, noisy=True)
    np.testing.assert_allclose(least.limit, 2)
    assert follow(least, 0.5, 20, short=True).iterations == 11


def train(model_fn, params, x, y, steps, noise=0.0, **options):
    """Losses, verdicts and CG iterations of steps on all examples, new noise in y at each."""
    tx = fvp.scale_by_fisher(model_fn, fvp.Gaussian(), **options)
    loss = lambda p, y: jnp.mean((model_fn(p, x) - y) ** 2) / 2

    def step(carry, key):
        params, state = carry
        targets = y + noise * jax.random.normal(key, y.shape)
        grads = jax.grad(loss)(params, targets)
        updates, state = tx.update(grads, state, params, batch=x, targets=targets)
        params = jax.tree.map(jnp.subtract, params, updates)
        return (params, state), (loss(params, y), state.accepted, state.iterations)

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[1])()


def test_budget_follows_progress():
    """A network of 32 tanh units on the diabetes data, where eleven iterations are too few."""
    standard = lambda x: jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)
    x, y = load_diabetes(return_X_y=True)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    params = (normal(10, 32), jnp.zeros(32), normal(32, 1), jnp.zeros(1))
    model_fn = lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3]
    arguments = model_fn, params, standard(x), standard(y[:, None]), 120
    losses, _, iterations = train(*arguments)
    fixed, _, fewer = train(*arguments, maxiter=11)
    assert fewer.max() == 11 == iterations[:15].max()
    assert iterations.max() > 50
    assert losses[-1] < 0.6 * fixed[-1]


def train_badly_scaled(noise=0.0, **options):
    """Least squares with a condition number of 1e6: eleven iterations do not solve it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 100)) * np.geomspace(1e-3, 1, 100))
    y = jnp.asarray(x @ rng.normal(size=(100, 1)))
    return train(lambda w, x: x @ w, jnp.zeros((100, 1)), x, y, 60, noise, **options)


def test_noise_lowers_the_budget():
    iterations = train_badly_scaled(noise=3.0, damping=fvp.LevenbergMarquardt())[2]
    assert iterations.max() == 11
    assert iterations[-20:].max() == 2


def test_solve_that_ends_without_descent_does_not_end_training():
    """Momentum may start CG so far off that eleven iterations do not get below the start."""
    losses, accepted, _ = train_badly_scaled(momentum=0.97, maxiter=11)
    assert not accepted.all()
    assert (accepted[1:] | accepted[:-1]).all()
    assert losses[-1] < 1e-6 * losses[0]


def test_without_damping_a_solve_that_broke_down_gets_some():
    """In float16, where the curvature leaves the range of floats below."""
    x, y, w = jnp.full((4, 1), 1e-3, jnp.float16), jnp.full((4, 1), 100.0), jnp.zeros((1, 1), "e")
    head, model = fvp.Gaussian(), lambda w, x: x @ w
    tx = fvp.natural_gradient(1.0, model, head, solver="dense", line_search="loss")
    loss = lambda w: head.nll(model(w, x), y).mean()

    @jax.jit
    def run():
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w, batch=x, targets=y)
            return (optax.apply_updates(w, updates), state), state.damping

        return jax.lax.scan(step, (w, tx.init(w)), length=12)

    (last, _), damping = run()
    assert damping[1] > damping[0]
    assert loss(last) < 0.5 * loss(w)


# The classical rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "rounding", "accepted", "change"),
    [
        (0.1, 0.0, True, 0.5),
        (0.24, 0.0, True, 0.5),
        (0.26, 0.0, True, 1.0),
        (0.74, 0.0, True, 1.0),
        (0.76, 0.0, True, 2.0),
        (0.9, 0.0, True, 2.0),
        (2.0, 0.0, False, 4.0),
        (0.9, 1.5, True, 1.0),
    ],
)
def test_classical_rule_follows_the_ratio_of_reductions(error, rounding, accepted, change):
    """The model says 1: its slope is 2, its curvature 2."""
    step = Step(*(jnp.asarray(value) for value in (2.0, 2.0, 0.3, 1.0)))
    outcome = Outcome(jnp.asarray(error), jnp.asarray(rounding), jnp.asarray(not accepted))
    after = fvp.ReductionRatio().correct(jnp.asarray(0.2), step, outcome, jnp.asarray(accepted))
    np.testing.assert_allclose(after, change * 0.2, rtol=1e-12)


@pytest.mark.parametrize(("damping", "error"), [(1e-8, 0.0), (1e30, 2.0)])
def test_classical_rule_keeps_damping_between_bounds(damping, error):
    step = Step(*(jnp.asarray(value) for value in (2.0, 2.0, 0.3, 1.0)))
    rejected = jnp.asarray(error > 1)
    outcome = Outcome(jnp.asarray(error), jnp.asarray(0.0), rejected)
    after = fvp.ReductionRatio().correct(jnp.asarray(damping), step, outcome, ~rejected)
    assert after == damping


# Damping by what a search leaves of exact steps ---------------------------------------------------


@pytest.mark.parametrize(
    ("before", "part", "accepted", "after"),
    [
        (0.0, 1.0, True, 0.0),  # nothing was needed
        (0.0, 1 / 8, True, 0.0),
        (0.0, 1 / 16, True, -1.0),  # to be chosen by the next step
        (0.0, 1.0, False, -1.0),
        (3.0, 1 / 16, True, 90.0),
        (3.0, 1.0, False, 90.0),
        (3.0, 1 / 8, True, 3.0),
        (3.0, 1 / 4, True, 0.1),
        (3.0, 1.0, True, 0.1),
    ],
)
def test_searched_damping_follows_the_part_of_a_step_that_is_left(before, part, accepted, after):
    numbers = [jnp.asarray(x) for x in (2.0, 2.0, 0.0, 0.5 * part, max(before, 1e-9), part)]
    step = Step(*numbers)
    outcome = Outcome(jnp.asarray(0.0), jnp.asarray(0.0), jnp.asarray(not accepted))
    rule = SearchedDamping()
    state = rule.correct(jnp.float32(before), step, outcome, jnp.asarray(accepted))
    np.testing.assert_allclose(state, after, rtol=1e-6)


def test_searched_damping_stops_growing_where_it_makes_gradient_steps():
    """At rounding no step is accepted any more; a new batch must not find damping without bound."""
    rejected = Outcome(jnp.asarray(0.5), jnp.asarray(0.0), jnp.asarray(True))
    for damping_term, after in ((100.0, 90.0), (4000.0, 3.0), (jnp.nan, 90.0)):
        numbers = [jnp.asarray(x) for x in (2.0, 2.0, damping_term, 1e-30, 3.0, 1e-30)]
        state = SearchedDamping().correct(
            jnp.float32(3), Step(*numbers), rejected, jnp.asarray(False)
        )
        np.testing.assert_allclose(state, after, rtol=1e-6)


def test_searched_damping_grows_where_the_solve_was_lost():
    """Its curvature is rounding then, and does not tell a gradient step."""
    lost = Outcome(jnp.asarray(jnp.inf), jnp.asarray(0.0), jnp.asarray(True))
    numbers = [jnp.asarray(x) for x in (2.0, 2.0, 4000.0, 1.0, 3.0, 1.0)]
    state = SearchedDamping().correct(jnp.float32(3), Step(*numbers), lost, jnp.asarray(False))
    np.testing.assert_allclose(state, 90, rtol=1e-6)


@pytest.mark.parametrize(
    ("state", "curvature", "damping"),
    [(0.0, 5.0, 0.0), (0.3, 5.0, 0.3), (-1.0, 5.0, 5e-3), (-1.0, 0.0, 2.0**-28)],
)
def test_searched_damping_starts_from_the_curvature_along_the_gradient(state, curvature, damping):
    rayleigh = lambda: jnp.asarray(curvature)
    norm = jnp.asarray(4.0)
    observation = fvp.Observation(jnp.int32(0), None, norm, None, rayleigh)
    kept, proposed = SearchedDamping().propose(jnp.float32(state), observation)
    np.testing.assert_allclose([kept, proposed], damping, rtol=1e-6)


# Bounds in KL ------------------------------------------------------------------------------------


@functools.cache
def bounded_step(name, **options):
    """One compilation for all bounds: the exact divergence, and whether the step was accepted."""
    p = problem(name)
    grads = p.unravel(p.dense[1])

    @jax.jit
    def step(max_kl):
        tx = fvp.scale_by_fisher(p.model_fn, p.head, max_kl=max_kl, **options)
        updates, state = p.step(tx, grads=grads)
        moved = jax.tree.map(jnp.subtract, p.params, updates)
        kl = jnp.mean(p.head.kl(p.model_fn(p.params, p.batch), p.model_fn(moved, p.batch)))
        return kl, state.accepted

    return step


@pytest.mark.each_value
@pytest.mark.parametrize("max_kl", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", HEADS)
def test_exact_divergence_meets_the_bound(name, max_kl):
    for options in ({"constant_kl": True}, {"damping": 1e-3}):
        kl, accepted = bounded_step(name, **options)(max_kl)
        assert 0.8 <= float(kl) / max_kl <= 1.05
        assert bool(accepted)


def test_step_within_the_bound_is_left_alone():
    p = problem()
    free, _ = p.step(adaptive(p, damping=1.0))
    bound, _ = p.step(adaptive(p, damping=1.0, max_kl=1e3))
    np.testing.assert_allclose(flatten(bound), flatten(free), rtol=1e-12)


# Line searches -----------------------------------------------------------------------------------


def test_halving_search_stops_where_the_loss_rises_again():
    asked = []

    def loss(a):
        asked.append(float(a))
        return jnp.asarray({1: jnp.nan, 0.5: 9.0, 0.25: 2.0, 0.125: 1.0, 0.0625: 1.5}[asked[-1]])

    with jax.disable_jit():
        found = halving_search(lambda a: (loss(a), 3 * a), jnp.asarray(5.0), jnp.zeros(()))
    assert tuple(map(float, found)) == (0.125, 1.0, 0.375)
    assert asked == [1, 0.5, 0.25, 0.125, 0.0625]


def test_halving_search_where_nothing_is_better():
    length, best, _ = halving_search(lambda a: (5 + a, None), jnp.asarray(5.0))
    assert float(length) <= 2.0**-20
    assert float(best) == 5 + float(length)  # the loss at the length that is returned


def test_halving_search_goes_on_where_the_step_is_far_too_long():
    length, best, _ = halving_search(lambda a: ((1e20 * a - 1.0) ** 2, None), jnp.asarray(1.0))
    assert float(best) < 1
    assert float(length) < 2e-20


@pytest.mark.parametrize("search", ["loss", "outputs"])
def test_line_search_finds_the_best_halving(search):
    p = problem()
    tx = fvp.natural_gradient(50.0, p.model_fn, p.head, damping=0.1, line_search=search, **SOLVED)
    updates, state = p.step(tx)
    F, g = p.dense
    d = p.unravel(-50 * np.linalg.solve(F + 0.1 * np.eye(len(g)), g))
    along = lambda a: jax.tree.map(lambda x, y: x + a * y, p.params, d)
    if search == "loss":
        values = [p.loss(along(2.0**-k)) for k in range(21)]
    else:
        model = lambda params: p.model_fn(params, p.batch)
        z, change = jax.jvp(model, (p.params,), (d,))
        values = [p.head.nll(z + 2.0**-k * change, p.targets).mean() for k in range(21)]
    assert bool(state.accepted)
    before = p.loss(p.params)
    first = next(k for k in range(20) if values[k] < before and values[k + 1] > values[k])
    assert 0 < first < 10
    np.testing.assert_allclose(flatten(updates), 2.0**-first * flatten(d), rtol=1e-6)


def test_line_search_does_not_try_its_length_again():
    """With value= the loss is traced once, in the loop that halves the step."""
    p, traced = problem(), []

    def value_fn(params, batch):
        traced.append(0)
        return p.head.nll(p.model_fn(params, batch), p.targets).mean()

    p.step(adaptive(p, damping=0.1, line_search="loss"), value_fn=value_fn, value=p.loss(p.params))
    assert len(traced) == 1


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("initial", lambda: {"damping": fvp.LevenbergMarquardt(initial=0.0)}),
        ("increase", lambda: {"damping": fvp.LevenbergMarquardt(increase=1.0)}),
        ("decrease", lambda: {"damping": fvp.LevenbergMarquardt(decrease=2.0)}),
        ("momentum", lambda: {"momentum": 1.5}),
        ("momentum", lambda: {"momentum": "heavy"}),
        ("line_search", lambda: {"line_search": "wolfe"}),
        ("max_kl", lambda: {"max_kl": -1.0}),
        ("max_kl", lambda: {"constant_kl": True}),
    ],
)
def test_wrong_options_are_named(word, options):
    with pytest.raises(ValueError, match=word):
        adaptive(problem(), **options())


def test_state_is_found_by_name_and_injects():
    p = problem()
    tx = optax.inject_hyperparams(fvp.natural_gradient, static_args=("model_fn", "momentum"))(
        learning_rate=1.0, model_fn=p.model_fn, head=p.head, damping=GENTLE
    )
    _, state = p.step(tx)
    assert bool(optax.tree.get(state, "accepted"))


# Steps never freeze in silence -------------------------------------------------------------------


@functools.cache
def linear_softmax(scale):
    """A model, its loss and its parameters, whose logits are of that size; float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 5, 64))
    w = jnp.asarray(scale * rng.normal(size=(8, 5)), jnp.float32)
    model_fn = lambda w, x: x @ w
    return model_fn, w, x, y, lambda w: fvp.Softmax().nll(model_fn(w, x), y).mean()


def follow_steps(tx, scale, count, gradient_of=None, **data):
    """Losses, verdicts, and the state at the end."""
    _, w, x, _, loss = linear_softmax(scale)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(gradient_of or loss)(w), state, w, batch=x, **data)
        w = optax.apply_updates(w, updates)
        return (w, state), (loss(w), state.accepted)

    run = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=count))
    (_, state), (losses, accepted) = run()
    return np.asarray(losses), np.asarray(accepted), state


KL_BOUND = {"max_kl": 0.01}


@pytest.mark.parametrize(
    ("options", "with_targets"),
    [
        (KL_BOUND, False),
        ({**KL_BOUND, "damping": 1e-3}, True),
        rarely({}, False),
        ({}, True),
        rarely({"solver": "dense", "line_search": "loss"}, True),  # a search needs the loss
        ({"solver": "dual", "line_search": "loss"}, True),
    ],
    ids=str,
)
def test_confident_and_wrong_model_keeps_moving(options, with_targets):
    """Its Fisher is zero to the last digit, and no quadratic model of the KL holds."""
    model_fn, _, _, y, loss = linear_softmax(1000)
    tx = fvp.natural_gradient(1.0, model_fn, fvp.Softmax(), **options)
    data = {"targets": y} if with_targets else {}
    losses, accepted, state = follow_steps(tx, 1000, 40, **data)
    assert losses[-1] < 0.8 * loss(linear_softmax(1000)[1])
    assert accepted[10:].any()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("solver", ["dense", "dual"])
def test_fisher_of_exactly_zero_is_no_obstacle_to_a_search(solver):
    model_fn, x, y = lambda w, x: x @ w, jnp.eye(2, dtype=jnp.float32), jnp.array([1, 0])
    w = jnp.asarray([[200.0, 0.0], [0.0, 200.0]], jnp.float32)
    head = fvp.Softmax()
    assert not fvp.fisher(model_fn, head, w, x).dense().any()
    tx = fvp.natural_gradient(1.0, model_fn, head, solver=solver, line_search="loss")
    loss = lambda w: head.nll(model_fn(w, x), y).mean()
    updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, batch=x, targets=y)
    assert state.accepted
    assert loss(w + updates) < 0.6 * loss(w)


# What the caller's gradient is of: so many times the loss, and so many times |w|^2.
GRADIENTS_OF = {"a sum": (64.0, 0.0), "a penalty": (1.0, 1.0), "the reward": (-1.0, 0.0)}


@functools.cache
def follow_gradients_of(make, length, count):
    """Verdicts and the state at the end, as a function of what the gradient is of."""
    model_fn, w, x, y, loss = linear_softmax(0.3)
    tx = optax.chain(make(model_fn, fvp.Softmax()), optax.scale(-length))

    @jax.jit
    def run(of_loss, of_penalty):
        def step(carry, _):
            w, state = carry
            gradient = jax.grad(lambda w: of_loss * loss(w) + of_penalty * jnp.sum(w**2))(w)
            updates, state = tx.update(gradient, state, w, batch=x, targets=y)
            return (optax.apply_updates(w, updates), state), state[0].accepted

        (_, state), accepted = jax.lax.scan(step, (w, tx.init(w)), length=count)
        return accepted, state[0]

    return run


@pytest.mark.each_value
@pytest.mark.parametrize("kind", GRADIENTS_OF)
@pytest.mark.parametrize("make", [fvp.scale_by_fisher, fvp.scale_by_kfac])
def test_gradient_of_another_loss_than_that_of_the_trial_is_reported(make, kind):
    accepted, state = follow_gradients_of(make, 1.0, 3)(*GRADIENTS_OF[kind])
    assert not accepted.all()
    assert bool(state.gradient_mismatch)


def test_the_right_gradient_is_never_reported_and_value_fn_serves_any_loss():
    model_fn, w, _, y, loss = linear_softmax(0.3)
    tx = fvp.natural_gradient(1.0, model_fn, fvp.Softmax())
    losses, _, state = follow_steps(tx, 0.3, 30, targets=y)
    assert losses[-1] < 0.8 * loss(w)
    assert not bool(state.gradient_mismatch)
    too_far = fvp.natural_gradient(1e4, model_fn, fvp.Softmax())
    _, accepted, state = follow_steps(too_far, 0.3, 2, targets=y)
    assert not accepted.all()
    assert not bool(state.gradient_mismatch)
    penalised = lambda w: loss(w) + 0.05 * jnp.sum(w**2)
    losses, accepted, state = follow_steps(
        tx, 0.3, 30, penalised, targets=y, value_fn=lambda w, x: penalised(w)
    )
    assert accepted[:10].sum() >= 3
    assert not bool(state.gradient_mismatch)


@functools.cache
def step_with_gradient_of_size(make):
    """The first state, and a step whose gradient is so many times that of the loss."""
    model_fn, w, x, y, loss = linear_softmax(0.3)
    tx = {
        "default": fvp.scale_by_fisher(model_fn, fvp.Softmax()),
        "max_kl": fvp.scale_by_fisher(model_fn, fvp.Softmax(), max_kl=0.1, warm_start=True),
        "kfac": fvp.scale_by_kfac(model_fn, fvp.Softmax()),
        "averaged kfac": fvp.scale_by_kfac(model_fn, fvp.Softmax(), example_batch=x),
    }[make]

    @jax.jit
    def step(size, state, w):
        updates, state = tx.update(size * jax.grad(loss)(w), state, w, batch=x, targets=y)
        w = w - updates
        return w, state, loss(w)

    return tx.init(w), step


@pytest.mark.each_value
@pytest.mark.parametrize("size", [1e19, 1e25, 1e37])
@pytest.mark.parametrize("make", ["default", "max_kl", "kfac", "averaged kfac"])
def test_one_enormous_gradient_leaves_every_state_finite(make, size):
    _, w, _, _, loss = linear_softmax(0.3)
    start = loss(w)
    state, step = step_with_gradient_of_size(make)
    for count in range(8):
        w, state, value = step(np.float32(size if count == 2 else 1), state, w)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert value < start
    assert bool(state.accepted)


def test_damping_stays_finite_however_often_steps_are_rejected():
    for make in (fvp.scale_by_fisher, fvp.scale_by_kfac):
        accepted, state = follow_gradients_of(make, 1e12, 120)(*GRADIENTS_OF["the reward"])
        assert not accepted[0]
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# Arguments that can't be -------------------------------------------------------------------------

MODEL, HEAD = lambda w, x: x @ w, fvp.Softmax()


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "head.*'softmax'", lambda: fvp.natural_gradient(1.0, MODEL, head="softmax")),
        (TypeError, r"head.*Softmax\(\)", lambda: fvp.scale_by_fisher(MODEL, fvp.Softmax)),
        (TypeError, "learning_rate, model_fn", lambda: fvp.natural_gradient(MODEL, HEAD, 1.0)),
        (TypeError, "model_fn, head", lambda: fvp.scale_by_fisher(HEAD, MODEL)),
        (TypeError, "model_fn, head", lambda: fvp.scale_by_kfac(HEAD, MODEL)),
        (TypeError, "head", lambda: fvp.scale_by_kfac(MODEL, "softmax")),
        (TypeError, "damping.*'lm'", lambda: fvp.scale_by_fisher(MODEL, HEAD, damping="lm")),
        (TypeError, "damping.*'lm'", lambda: fvp.scale_by_kfac(MODEL, HEAD, damping="lm")),
        (
            TypeError,
            r"damping.*LevenbergMarquardt\(\)",
            lambda: fvp.scale_by_fisher(MODEL, HEAD, damping=fvp.LevenbergMarquardt),
        ),
        (ValueError, "damping", lambda: fvp.scale_by_fisher(MODEL, HEAD, damping=np.nan)),
        (ValueError, "damping", lambda: fvp.scale_by_fisher(MODEL, HEAD, damping=np.inf)),
        (ValueError, "damping", lambda: fvp.scale_by_kfac(MODEL, HEAD, damping=-1.0)),
        (ValueError, "damping", lambda: fvp.scale_by_fisher(MODEL, HEAD, damping=jnp.array(-1.0))),
        (ValueError, "l2", lambda: fvp.scale_by_fisher(MODEL, HEAD, l2=-1)),
        (ValueError, "tol", lambda: fvp.scale_by_fisher(MODEL, HEAD, tol=-1e-3)),
        (ValueError, "max_kl", lambda: fvp.scale_by_fisher(MODEL, HEAD, max_kl=np.nan)),
        (ValueError, "learning_rate", lambda: fvp.natural_gradient(np.nan, MODEL, HEAD)),
    ],
)
def test_wrong_arguments_raise_where_the_transform_is_made(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_no_loop_over_a_small_model_is_compiled_as_one_kernel():
    """XLA does so on CPU with loops of few bytes, and LLVM takes ten times as long as for all else.

    The loops of its own random numbers, which are such, are not in a step.
    """
    sizes = [8, 32, 32, 32, 2]
    params = [jnp.ones(shape) for shape in itertools.pairwise(sizes)]

    def model_fn(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    head, x, y = fvp.Softmax(), jnp.ones((16, 8)), jnp.zeros(16, int)
    tx = fvp.natural_gradient(1.0, model_fn, head)
    grads = jax.grad(lambda params: head.nll(model_fn(params, x), y).mean())(params)
    step = lambda grads, state, params: tx.update(grads, state, params, batch=x, targets=y)
    compiled = jax.jit(step).lower(grads, tx.init(params), params).compile()
    assert " while(" in compiled.as_text()
    assert "small_call" not in compiled.as_text()
