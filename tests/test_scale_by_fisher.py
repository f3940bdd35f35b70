"""The natural-gradient transforms: what they return and record, against dense float64 algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import (
    CASES,
    linear,
    linear_parameters,
    mlp,
    parameters,
    rarely,
    reference,
    relative_error,
)
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

SOLVED = {"tol": 1e-13, "maxiter": 200}
WEIGHTS = jnp.asarray([1.0, 0.0, 2.0, 0.5, 0.0, 3.0, 1.5])
CURVATURES = {"fisher": "fisher", "ggn": "ggn", "empirical": "empirical_fisher"}


class Problem:
    """A tiny model, its batch, and its dense gradient and curvatures."""

    def __init__(self, name, model, make_params, weights):
        rng = np.random.default_rng(3)
        case = CASES[name]
        self.model_fn, self.head = model(case.event_shape), case.head
        self.params = make_params(rng, case.size)
        self.batch = jnp.asarray(rng.normal(size=(7, 2)))
        self.targets = case.targets(rng, (7,))
        self.weights = weights
        full_weights = jnp.ones(7) if weights is None else weights
        dense = reference(case, self.model_fn, self.params, self.batch, self.targets, full_weights)
        self.matrices = {name: np.asarray(dense[key]) for name, key in CURVATURES.items()}
        self.flat_grads = np.asarray(dense["gradient"])
        self.unravel = ravel_pytree(self.params)[1]
        self.grads = self.unravel(dense["gradient"])

    def direction(self, damping, curvature="fisher", grads=None):
        grads = self.flat_grads if grads is None else grads
        matrix = self.matrices[curvature]
        return np.linalg.solve(matrix + damping * np.eye(len(grads)), grads)

    def step(self, tx, state=None, grads=None, **extra_args):
        """One compiled update, with the batch unless `operator` comes in its place."""
        state = tx.init(self.params) if state is None else state
        grads = self.grads if grads is None else grads
        if "operator" not in extra_args:
            data = {"batch": self.batch, "weights": self.weights, "targets": self.targets}
            extra_args = {**data, **extra_args}
        return jax.jit(tx.update)(grads, state, self.params, **extra_args)


@functools.cache
def problem(name="softmax", model=mlp, weighted=False):
    make_params = parameters if model is mlp else linear_parameters
    return Problem(name, model, make_params, WEIGHTS if weighted else None)


@functools.cache
def scale_by_fisher(name="softmax", **options):
    """One object for equal options, so that tests share its compiled update."""
    return fvp.scale_by_fisher(problem(name).model_fn, problem(name).head, **options)


@functools.cache
def natural_gradient(learning_rate, name="softmax", **options):
    return fvp.natural_gradient(
        learning_rate, problem(name).model_fn, problem(name).head, **options
    )


def flatten(tree):
    return np.asarray(ravel_pytree(tree)[0])


def assert_close(tree, expected, rtol=1e-8):
    assert relative_error(flatten(tree), np.asarray(expected)) <= rtol


def assert_rejected(updates, state, before):
    """Zero updates, reported, and a warm start as it was."""
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert not bool(state.accepted)
    jax.tree.map(np.testing.assert_array_equal, state.direction, before.direction)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.direction))
    assert float(state.predicted_kl) == 0


def diagnostics(state):
    names = ("iterations", "residual_norm", "damping", "predicted_kl", "accepted")
    return {name: np.asarray(optax.tree.get(state, name)) for name in names}


# The step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["softmax", "gaussian-precision"])
def test_direction_is_the_damped_inverse_curvature_times_the_gradient(name, curvature):
    """With weights; the tests below do without."""
    p = problem(name, weighted=True)
    updates, state = p.step(scale_by_fisher(name, damping=0.02, curvature=curvature, **SOLVED))
    assert_close(updates, p.direction(0.02, curvature))
    assert bool(state.accepted)


def test_gradient_need_not_be_that_of_the_loss():
    p = problem()
    grads = np.linspace(-1, 1, p.flat_grads.size)
    updates, _ = p.step(scale_by_fisher(damping=0.02, **SOLVED), grads=p.unravel(grads))
    assert_close(updates, p.direction(0.02, grads=grads))


def test_zero_weight_rows_do_not_reach_the_step():
    p = problem(weighted=True)
    tx = scale_by_fisher(damping=0.02, **SOLVED)
    keep = np.asarray(WEIGHTS) > 0
    subset, _ = p.step(tx, batch=p.batch[keep], targets=p.targets[keep], weights=WEIGHTS[keep])
    garbage, _ = p.step(tx, batch=jnp.where(keep[:, None], p.batch, 1e30))
    assert_close(subset, p.direction(0.02))
    assert_close(garbage, p.direction(0.02))


@pytest.mark.parametrize(
    "options",
    [
        {"damping": fvp.LevenbergMarquardt(initial=5.0)},
        {"max_kl": 1e-3},
        rarely({"line_search": "outputs"}),
        {"solver": "dual", "damping": 0.02},
    ],
    ids=str,
)
def test_inputs_without_weight_that_are_not_finite_do_not_reach_a_tried_step(options):
    """Nor its trial: step and state are those of the batch without them."""
    p, keep = problem(weighted=True), np.asarray(WEIGHTS) > 0
    tx = scale_by_fisher(**options)
    bad = jnp.where(keep[:, None], p.batch, jnp.asarray([np.nan, np.inf]))
    labels = jnp.where(keep, p.targets, -1)
    subset = {"batch": p.batch[keep], "targets": p.targets[keep], "weights": WEIGHTS[keep]}
    updates, state = p.step(tx, batch=bad, targets=labels)
    expected, expected_state = p.step(tx, **subset)
    assert bool(state.accepted)
    assert_close(updates, flatten(expected), rtol=1e-7)
    for name, value in diagnostics(state).items():
        np.testing.assert_allclose(value, diagnostics(expected_state)[name], rtol=1e-4, atol=1e-9)


def test_natural_gradient_is_minus_learning_rate_times_the_direction():
    p = problem()
    for rate in (0.3, lambda count: 0.3 + 0.1 * count):
        updates, _ = p.step(natural_gradient(rate, damping=0.02, **SOLVED))
        assert_close(updates, -0.3 * p.direction(0.02))

    @jax.jit
    def traced(rate, damping):
        tx = fvp.natural_gradient(rate, p.model_fn, p.head, damping=damping, **SOLVED)
        return tx.update(p.grads, tx.init(p.params), p.params, batch=p.batch)[0]

    assert_close(traced(0.7, 0.05), -0.7 * p.direction(0.05))


def test_schedules_are_read_at_the_step_count_from_zero():
    p = problem()
    tx = natural_gradient(
        lambda count: 1.0 / (1 + count), damping=lambda count: 0.1 * 0.5**count, **SOLVED
    )
    state = tx.init(p.params)
    assert int(state.count) == 0
    for count in range(3):
        updates, state = p.step(tx, state)
        np.testing.assert_allclose(optax.tree.get(state, "damping"), 0.1 * 0.5**count)
        assert_close(updates, -p.direction(0.1 * 0.5**count) / (1 + count))
        assert int(state.count) == count + 1


def test_one_undamped_step_solves_linear_least_squares():
    p = problem("gaussian", linear)
    updates, _ = p.step(fvp.natural_gradient(1.0, p.model_fn, p.head, damping=0.0, **SOLVED))
    new = optax.apply_updates(p.params, updates)
    design = np.column_stack([p.batch, np.ones(7)])
    expected, *_ = np.linalg.lstsq(design, np.asarray(p.targets), rcond=None)
    np.testing.assert_allclose(new["out"]["w"], expected[:2], atol=1e-9)
    np.testing.assert_allclose(new["out"]["b"], expected[2], atol=1e-9)


def test_maxiter_bounds_the_solve_and_gives_the_iterate_of_cg():
    p = problem()
    updates, state = p.step(scale_by_fisher(damping=1e-3, maxiter=4, tol=0.0))
    F = fvp.fisher(p.model_fn, p.head, p.params, p.batch)
    expected, info = fvp.cg(F, p.grads, damping=1e-3, maxiter=4, tol=0.0)
    assert int(state.iterations) == int(info.iterations) == 4
    assert_close(updates, flatten(expected), rtol=1e-11)


def test_cg_solves_with_a_curvature_operator():
    p = problem()
    F = fvp.fisher(p.model_fn, p.head, p.params, p.batch)
    x, info = fvp.cg(F, p.grads, damping=0.02, tol=1e-13)
    assert bool(info.converged)
    assert_close(x, p.direction(0.02))
    np.testing.assert_allclose(info.curvature, F.quadratic_form(x), rtol=1e-10)


def test_none_leaves_pass_through():
    p = problem()
    params, grads = {**p.params, "absent": None}, {**p.grads, "absent": None}
    tx = scale_by_fisher(damping=0.02, **SOLVED)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, batch=p.batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_close(updates, p.direction(0.02))


# Warm start --------------------------------------------------------------------------------------


def test_warm_start_saves_iterations_and_changes_nothing_else():
    p = problem()
    iterations = {}
    for warm_start in (False, True):
        tx = scale_by_fisher(damping=1e-3, warm_start=warm_start, tol=1e-6, maxiter=200)
        _, state = p.step(tx)
        cold = int(state.iterations)
        updates, state = p.step(tx, state)
        iterations[warm_start] = cold, int(state.iterations)
        assert_close(updates, p.direction(1e-3), rtol=1e-4)
        assert (state.direction is not None) == warm_start
    assert iterations[False][0] == iterations[False][1] == iterations[True][0]
    assert iterations[True][1] < iterations[True][0]


def test_warm_start_is_the_same_whatever_the_learning_rate():
    p = problem()
    options = dict(damping=0.1, warm_start=True, **SOLVED)
    states = [p.step(natural_gradient(rate, **options))[1] for rate in (1.0, 0.1)]
    assert_close(states[0].direction, flatten(states[1].direction), rtol=1e-12)


# The oracle form ---------------------------------------------------------------------------------


def test_operator_takes_the_place_of_the_batch():
    p = problem()
    calls = []

    def model_fn(params, batch):
        calls.append(None)
        return p.model_fn(params, batch)

    tx = fvp.scale_by_fisher(model_fn, p.head, damping=0.02, **SOLVED)

    @jax.jit
    def step(params, state):
        F = fvp.fisher(model_fn, p.head, params, p.batch)
        _, grads = F.value_and_grad(p.targets)
        return tx.update(grads, state, params, operator=F)

    updates, _state = step(p.params, tx.init(p.params))
    assert len(calls) == 1  # gradient and curvature share one linearisation
    assert_close(updates, p.direction(0.02))
    assert_close(updates, flatten(p.step(tx)[0]), rtol=1e-10)


def test_operator_may_be_another_curvature():
    p = problem()
    E = fvp.empirical_fisher(p.model_fn, p.head, p.params, p.batch, p.targets)
    updates, state = p.step(scale_by_fisher(damping=0.02, **SOLVED), operator=E)
    assert_close(updates, p.direction(0.02, "empirical"))
    kl = 0.5 * flatten(updates) @ p.matrices["empirical"] @ flatten(updates)
    np.testing.assert_allclose(state.predicted_kl, kl, rtol=1e-6)


# Diagnostics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("maxiter", [3, 200])
@pytest.mark.parametrize("learning_rate", [None, 0.3])
def test_diagnostics_describe_the_step_that_was_returned(learning_rate, maxiter):
    p = problem()
    options = {"damping": 0.02, "tol": 1e-10, "maxiter": maxiter}
    tx = scale_by_fisher(**options)
    if learning_rate is not None:
        tx = natural_gradient(learning_rate, **options)
    updates, state = p.step(tx)
    record = diagnostics(state)
    direction = flatten(updates) / (1.0 if learning_rate is None else -learning_rate)
    F = p.matrices["fisher"]
    residual = p.flat_grads - F @ direction - 0.02 * direction
    np.testing.assert_allclose(
        record["predicted_kl"], 0.5 * flatten(updates) @ F @ flatten(updates)
    )
    np.testing.assert_allclose(
        record["residual_norm"], np.linalg.norm(residual), rtol=1e-5, atol=1e-12
    )
    np.testing.assert_allclose(record["damping"], 0.02)
    assert record["accepted"]
    assert 0 < record["iterations"] <= maxiter
    assert (record["iterations"] == 3) == (maxiter == 3)


def test_predicted_kl_is_the_divergence_that_a_small_step_makes():
    p = problem()
    updates, state = p.step(natural_gradient(1e-5, damping=0.1, **SOLVED))
    z = p.model_fn(p.params, p.batch)
    z_new = p.model_fn(optax.apply_updates(p.params, updates), p.batch)
    np.testing.assert_allclose(state.predicted_kl, jnp.mean(p.head.kl(z, z_new)), rtol=1e-3)


def test_initial_state_has_the_diagnostics_too():
    state = scale_by_fisher(damping=0.02).init(problem().params)
    assert all(value.shape == () for value in diagnostics(state).values())


# Rejection ---------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", ["scale_by_fisher", "natural_gradient"])
def test_non_finite_gradient_is_rejected_and_the_next_step_is_sound(make, bad):
    p = problem()
    options = dict(damping=0.02, warm_start=True, **SOLVED)
    sign = 1.0 if make == "scale_by_fisher" else -1.0
    tx = scale_by_fisher(**options) if sign > 0 else natural_gradient(1.0, **options)
    for before in (tx.init(p.params), p.step(tx)[1]):
        grads = {**p.grads, "out": {**p.grads["out"], "b": p.grads["out"]["b"].at[1].set(bad)}}
        updates, state = p.step(tx, before, grads)
        assert_rejected(updates, state, before)
        updates, state = p.step(tx, state)
        assert_close(updates, sign * p.direction(0.02))
        assert bool(state.accepted)


def test_non_finite_model_output_is_rejected():
    p = problem()
    tx = scale_by_fisher(damping=0.02, warm_start=True, **SOLVED)
    before = p.step(tx)[1]
    assert_rejected(*p.step(tx, before, batch=p.batch.at[2, 0].set(jnp.nan)), before)


def test_negative_curvature_is_rejected():
    """The Hessian of (w_1 w_2 - 5)^2 / 2 at the origin is a saddle."""
    params, grads = jnp.zeros(2), jnp.ones(2)
    saddle = lambda params, batch: jnp.full((3, 1), params[0] * params[1])
    H = fvp.hessian(saddle, fvp.Gaussian(), params, None, jnp.full((3, 1), 5.0))
    assert float(H.quadratic_form(grads)) < 0
    tx = fvp.scale_by_fisher(saddle, fvp.Gaussian(), damping=0.02, warm_start=True)
    before = tx.init(params)
    assert_rejected(*jax.jit(tx.update)(grads, before, params, operator=H), before)


def test_solve_that_meets_negative_curvature_late_returns_its_last_good_iterate():
    def model_fn(params, batch):
        return jnp.stack([params[:3] @ batch, params[3] ** 2])[None]

    params, batch = jnp.zeros(4), jnp.asarray([2.0, 1.0, 0.5])
    targets, grads = jnp.asarray([[1.0, 1.0]]), jnp.asarray([2.0, 1.0, 0.5, 1e-3])
    H = fvp.hessian(model_fn, fvp.Gaussian(), params, batch, targets)
    tx = fvp.scale_by_fisher(model_fn, fvp.Gaussian(), damping=0.1, tol=1e-9)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, operator=H)
    x, info = fvp.cg(H, grads, damping=0.1, tol=1e-9)
    assert bool(info.breakdown)
    assert float(info.model_value) < 0
    assert_close(updates, x)
    assert bool(state.accepted)


def test_rejected_step_is_zero_also_where_the_solve_returns_its_start():
    """The second solve breaks down at once, at a start that ascends."""
    square, params, one = lambda params, batch: params[None] ** 2, jnp.zeros(1), jnp.ones(1)
    convex, concave = [
        fvp.hessian(square, fvp.Gaussian(), params, None, jnp.full((1, 1), y)) for y in (-0.5, 0.1)
    ]
    tx = fvp.scale_by_fisher(square, fvp.Gaussian(), damping=0.1, warm_start=True)
    step = jax.jit(tx.update)
    updates, before = step(one, tx.init(params), params, operator=convex)
    assert_close(updates, one / 1.1, rtol=1e-12)
    assert_rejected(*step(-one, before, params, operator=concave), before)


def test_zero_gradient_gives_a_zero_step_and_leaves_the_next_one_sound():
    p = problem()
    tx = scale_by_fisher(damping=0.02, warm_start=True, **SOLVED)
    for before in (tx.init(p.params), p.step(tx)[1]):
        updates, state = p.step(tx, before, jax.tree.map(jnp.zeros_like, p.grads))
        np.testing.assert_array_equal(flatten(updates), 0)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
        assert float(state.predicted_kl) == 0
        updates, state = p.step(tx, state)
        assert_close(updates, p.direction(0.02))


@pytest.mark.parametrize("damping", [0.02, 0.0])
def test_batch_of_zero_weights_gives_a_zero_step(damping):
    """Its loss is zero, so are gradient and curvature; no NaN, whatever the damping."""
    p = problem()
    tx = scale_by_fisher(damping=damping, warm_start=True, **SOLVED)
    state = p.step(tx)[1] if damping else tx.init(p.params)
    F = fvp.fisher(p.model_fn, p.head, p.params, p.batch, weights=jnp.zeros(7))
    _, grads = F.value_and_grad(p.targets)
    updates, state = p.step(tx, state, grads, weights=jnp.zeros(7))
    np.testing.assert_array_equal(flatten(updates), 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_gradient_without_any_curvature_is_rejected():
    p = problem()
    tx = scale_by_fisher(damping=0.0, warm_start=True, **SOLVED)
    before = tx.init(p.params)
    assert_rejected(*p.step(tx, before, weights=jnp.zeros(7)), before)


def test_rejection_inside_scan_skips_one_step():
    p = problem()
    tx = scale_by_fisher(damping=0.02, warm_start=True, **SOLVED)

    @jax.jit
    def run(scales):
        def step(state, scale):
            grads = jax.tree.map(lambda g: scale * g, p.grads)
            updates, state = tx.update(grads, state, p.params, batch=p.batch)
            return state, (ravel_pytree(updates)[0], state.accepted)

        return jax.lax.scan(step, tx.init(p.params), scales)[1]

    updates, accepted = run(jnp.asarray([1.0, jnp.nan, 2.0, jnp.inf, 3.0]))
    assert accepted.tolist() == [True, False, True, False, True]
    for i, scale in enumerate([1.0, 0.0, 2.0, 0.0, 3.0]):
        np.testing.assert_allclose(updates[i], scale * p.direction(0.02), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_solving_far_past_convergence_is_not_a_rejection(dtype):
    p = problem()
    params, grads = jax.tree.map(lambda leaf: leaf.astype(dtype), (p.params, p.grads))
    tx = scale_by_fisher(damping=0.1, tol=0.0, maxiter=400)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=p.batch.astype(dtype))
    assert bool(state.accepted)
    assert_close(updates, p.direction(0.1), rtol=1e3 * jnp.finfo(dtype).eps)


# Parameter subsets -------------------------------------------------------------------------------


def sub_block(p, keep, damping):
    """The direction on the kept entries: the inverse of the exact sub-block of F + damping I."""
    block = p.matrices["fisher"][np.ix_(keep, keep)]
    return np.linalg.solve(block + damping * np.eye(keep.sum()), p.flat_grads[keep])


def kept(p, mask):
    return flatten(jax.tree.map(lambda m, leaf: jnp.full_like(leaf, m), mask, p.params)) > 0


MASKS = {
    "leaf": {"hidden": {"w": True, "b": False}, "out": {"w": True, "b": False}},
    "subtree": {"hidden": True, "out": False},
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_solves_with_the_exact_sub_block(name):
    p = problem()
    mask = MASKS[name]
    full = {key: {"w": m, "b": m} if isinstance(m, bool) else m for key, m in mask.items()}
    tx = optax.masked(scale_by_fisher(damping=0.02, warm_start=True, **SOLVED), mask)
    keep = kept(p, full)
    state = tx.init(p.params)
    for _ in range(2):
        updates, state = p.step(tx, state, all_params=p.params)
        assert_close(flatten(updates)[keep], sub_block(p, keep, 0.02))
        np.testing.assert_array_equal(flatten(updates)[~keep], p.flat_grads[~keep])
    step = flatten(updates)[keep]
    kl = 0.5 * step @ p.matrices["fisher"][np.ix_(keep, keep)] @ step
    np.testing.assert_allclose(optax.tree.get(state, "predicted_kl"), kl, rtol=1e-6)


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_masked_works_for_every_curvature(curvature):
    p = problem()
    tx = scale_by_fisher(damping=0.02, curvature=curvature, **SOLVED)
    keep = kept(p, MASKS["leaf"])
    updates, _ = p.step(optax.masked(tx, MASKS["leaf"]), all_params=p.params)
    block = p.matrices[curvature][np.ix_(keep, keep)] + 0.02 * np.eye(keep.sum())
    assert_close(flatten(updates)[keep], np.linalg.solve(block, p.flat_grads[keep]))


def test_partition_gives_each_group_its_own_block():
    p = problem()
    labels = {"hidden": {"w": "a", "b": "b"}, "out": {"w": "a", "b": "frozen"}}
    tx = optax.partition(
        {
            "a": natural_gradient(1.0, damping=0.02, **SOLVED),
            "b": natural_gradient(0.5, damping=0.3, **SOLVED),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    updates, _ = p.step(tx, all_params=p.params)
    for label, scale, damping in [("a", -1.0, 0.02), ("b", -0.5, 0.3)]:
        keep = kept(p, jax.tree.map(lambda other, label=label: other == label, labels))
        assert_close(flatten(updates)[keep], scale * sub_block(p, keep, damping))
    np.testing.assert_array_equal(updates["out"]["b"], 0)


def test_masked_follows_the_whole_parameters_not_those_it_saw_first():
    """The frozen leaves enter the model: changing them changes the block."""
    p = problem()
    tx = optax.masked(scale_by_fisher(damping=0.02, **SOLVED), MASKS["subtree"])
    before, _ = p.step(tx, all_params=p.params)
    moved = {**p.params, "out": jax.tree.map(lambda leaf: 2 * leaf, p.params["out"])}
    after, _ = p.step(tx, all_params=moved)
    assert not np.allclose(flatten(before["hidden"]), flatten(after["hidden"]))


def test_masked_without_the_whole_parameters_says_what_to_pass():
    p = problem()
    tx = optax.masked(scale_by_fisher(damping=0.02), MASKS["leaf"])
    with pytest.raises(ValueError, match="all_params"):
        p.step(tx)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["scale_by_fisher", "natural_gradient"])
def test_missing_arguments_of_update_are_named(make):
    p = problem()
    tx = scale_by_fisher(damping=0.1) if make == "scale_by_fisher" else natural_gradient(0.1)
    state = tx.init(p.params)
    with pytest.raises(ValueError, match=r"\bbatch\b"):
        tx.update(p.grads, state, p.params)
    with pytest.raises(ValueError, match=r"\bparams\b"):
        tx.update(p.grads, state, batch=p.batch)


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_missing_targets_are_named(curvature):
    p = problem()
    tx = scale_by_fisher(damping=0.1, curvature=curvature)
    with pytest.raises(ValueError, match=r"\btargets\b"):
        tx.update(p.grads, tx.init(p.params), p.params, batch=p.batch)


@pytest.mark.parametrize(
    ("error", "word", "make"),
    [
        (ValueError, "curvature", lambda p: scale_by_fisher(damping=0.1, curvature="kronecker")),
        (TypeError, "model_fn", lambda p: fvp.scale_by_fisher(3, p.head, damping=0.1)),
        (TypeError, "head", lambda p: fvp.scale_by_fisher(p.model_fn, "softmax", damping=0.1)),
        (TypeError, "head", lambda p: fvp.natural_gradient(0.1, p.model_fn, fvp.Softmax)),
        (ValueError, "damping", lambda p: scale_by_fisher(damping=-1.0)),
        (ValueError, "maxiter", lambda p: scale_by_fisher(damping=0.1, maxiter=-1)),
    ],
)
def test_wrong_constructor_arguments_are_named(error, word, make):
    with pytest.raises(error, match=rf"\b{word}\b"):
        problem().step(make(problem()))


def test_integer_parameters_are_named():
    p = problem()
    params = {**p.params, "steps": jnp.arange(3)}
    grads = {**p.grads, "steps": jnp.zeros(3)}
    tx = scale_by_fisher(damping=0.1)
    with pytest.raises(TypeError, match="steps"):
        tx.update(grads, tx.init(params), params, batch=p.batch)


def test_gradients_of_another_structure_are_refused():
    p = problem()
    tx = scale_by_fisher(damping=0.1)
    with pytest.raises(ValueError, match=r"updates|grads"):
        tx.update({"out": p.grads["out"]}, tx.init(p.params), p.params, batch=p.batch)
