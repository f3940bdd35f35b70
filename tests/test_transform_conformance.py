"""One battery for every transform: what optax wrappers, JAX transformations and Flax expect.

After the ideas of optax's own batteries for contributed optimisers and for sharding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvp
from fvp.compatibility import pure_state

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()


def model_fn(params, batch):
    return batch @ params["layer"]["w"] + params["shift"]


def value_fn(params, batch):
    return jnp.mean(HEAD.nll(model_fn(params, batch), TARGETS))


def make_params(dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {"layer": {"w": normal(2, 3)}, "shift": normal(3)}


TARGETS = jnp.asarray([0, 1, 2, 0, 1, 2])
BATCH = jnp.asarray(np.random.default_rng(9).normal(size=(6, 2)))
PARAMS = make_params()
GRADS = jax.jit(jax.grad(value_fn))(PARAMS, BATCH)
SCALES = (1.0, -0.5, 2.0, 0.1)


def scale_by_fisher(**options):
    return fvp.scale_by_fisher(model_fn, HEAD, **{"damping": 0.1, **options})


def natural_gradient(learning_rate=0.5, **options):
    return fvp.natural_gradient(learning_rate, model_fn, HEAD, **{"damping": 0.1, **options})


# Float32 schedules: the values of this rate are exact, so that every program computes the same.
RATE, DAMPING = optax.linear_schedule(1.0, 0.125, 8), optax.exponential_decay(0.2, 5, 0.5)
TRANSFORMS = {
    "scale_by_fisher": scale_by_fisher(),
    "natural_gradient": natural_gradient(),
    "warm_started": natural_gradient(warm_start=True),
    "scheduled": natural_gradient(RATE, damping=DAMPING),
    "empirical": scale_by_fisher(curvature="empirical", warm_start=True),
    "defaults": fvp.natural_gradient(0.5, model_fn, HEAD),
}
WARM = TRANSFORMS["warm_started"]


def over(*names):
    return pytest.mark.parametrize("tx", [TRANSFORMS[name] for name in names], ids=names)


every_transform = over(*TRANSFORMS)
each_kind_of_state = over("scale_by_fisher", "warm_started", "empirical", "defaults")


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def scaled(scale, tree=GRADS):
    return jax.tree.map(lambda leaf: scale * leaf, tree)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def update(tx, grads, state, params, **extra_args):
    return tx.update(grads, state, params, batch=BATCH, targets=TARGETS, **extra_args)


def run(tx, **extra_args):
    """Updates and states for gradients of several scales; types stay, one program serves all."""
    step = jax.jit(lambda grads, state: update(tx, grads, state, PARAMS, **extra_args))
    updates, states = [], [tx.init(PARAMS)]
    for scale in SCALES:
        new_updates, state = step(scaled(scale), states[-1])
        assert types(state) == types(states[0])
        assert types(new_updates) == types(PARAMS)
        updates.append(new_updates)
        states.append(state)
    assert step._cache_size() == 1
    return updates, states


@functools.cache
def plain(tx):
    """The same without wrappers or further arguments, computed once for each transform."""
    return run(tx)


def assert_trees_close(actual, expected, rtol=1e-9):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-2 * rtol)
    jax.tree.map(close, actual, expected)


def assert_zeros(tree):
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), tree)


def assert_diagnostics_are_found(state):
    for name in ("iterations", "residual_norm", "damping", "predicted_kl", "accepted"):
        assert optax.tree.get(state, name).shape == ()
    assert int(optax.tree.get(state, "iterations")) > 0
    assert bool(optax.tree.get(state, "accepted"))
    assert float(optax.tree.get(state, "predicted_kl")) > 0


def descend(tx, **options):
    """Losses along some compiled steps, and where they end."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params, BATCH)
        search = {"value": value, "grad": grad, "value_fn": value_fn} if options else {}
        updates, state = tx.update(grad, state, params, batch=BATCH, **search)
        return optax.apply_updates(params, updates), state, value

    params, state, values = PARAMS, tx.init(PARAMS), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    return [*values, float(value_fn(params, BATCH))], params, state


# Types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("warm_started", jnp.float16),
        ("warm_started", jnp.bfloat16),
        ("warm_started", jnp.float32),
        ("warm_started", jnp.float64),
        ("scale_by_fisher", jnp.float16),
        ("empirical", jnp.bfloat16),
    ],
)
def test_types_are_constant_and_one_program_serves_every_step(name, dtype):
    tx = TRANSFORMS[name]
    params, batch = make_params(dtype), BATCH.astype(dtype)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        grads = jax.grad(value_fn)(params, batch)
        # The outcomes of a branch must agree in type to the last detail.
        updates, state = jax.lax.cond(
            optax.tree.sum(grads) > -1e3,
            lambda: tx.update(grads, state, params, batch=batch, targets=TARGETS),
            lambda: (grads, state),
        )
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    before = types(state)
    for _ in range(3):
        params, state, updates = step(params, state)
        assert types(state) == before
        assert types(updates) == types(params) == types(make_params(dtype))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))
        assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))
    assert len(traces) == step._cache_size() == 1


def test_updates_have_the_dtypes_of_the_gradients():
    """Gradients kept narrower than the parameters, leaf by leaf."""
    grads = {
        "layer": jax.tree.map(lambda g: g.astype(jnp.float32), GRADS["layer"]),
        "shift": GRADS["shift"].astype(jnp.bfloat16),
    }
    state = WARM.init(PARAMS)
    updates, after = jax.jit(lambda g, s: update(WARM, g, s, PARAMS))(grads, state)
    assert types(updates) == types(grads)
    assert types(after) == types(state)
    assert_trees_close(updates, plain(WARM)[0][0], rtol=3e-2)


@every_transform
def test_abstract_evaluation_has_the_types_of_the_real_thing(tx):
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    state = tx.init(PARAMS)
    assert shapes(tx.init(abstract)) == shapes(state)
    assert shapes(jax.eval_shape(tx.init, PARAMS)) == shapes(state)
    assert types(jax.jit(tx.init)(PARAMS)) == types(state)
    outputs = jax.eval_shape(lambda g, s, p: update(tx, g, s, p), abstract, state, abstract)
    assert shapes(outputs) == (shapes(PARAMS), shapes(state))


@every_transform
def test_map_params_reaches_the_trees_like_params_only(tx):
    state = plain(tx)[1][1]
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    warm = state.direction is not None
    expected = state._replace(direction=scaled(2, state.direction)) if warm else state
    if state.control is not None:
        squares = scaled(2, state.control.squares)
        expected = expected._replace(control=state.control._replace(squares=squares))
    if state.noise is not None:
        noise = state.noise
        moments = noise.moments._replace(second_moment=scaled(2, noise.moments.second_moment))
        average = noise.average._replace(ahead=scaled(2, noise.average.ahead))
        trail = scaled(2, noise.trail)
        noise = noise._replace(trail=trail, average=average, moments=moments)
        expected = expected._replace(noise=noise)
    jax.tree.map(np.testing.assert_array_equal, doubled, expected)


@every_transform
def test_diagnostics_are_found_by_name(tx):
    assert_diagnostics_are_found(plain(tx)[1][1])


@every_transform
def test_unknown_extra_args_are_tolerated(tx):
    unknown = {"value": jnp.ones(()), "unexpected": {"anything": "at all"}}
    traced = jax.make_jaxpr(lambda g, s: update(tx, g, s, PARAMS, **unknown))
    assert str(traced(GRADS, tx.init(PARAMS))) == str(
        jax.make_jaxpr(lambda g, s: update(tx, g, s, PARAMS))(GRADS, tx.init(PARAMS))
    )


def test_no_state_field_hides_the_arguments_of_a_line_search():
    assert {"value", "grad"}.isdisjoint(WARM.init(PARAMS)._fields)


# JAX transformations -----------------------------------------------------------------------------


@over("natural_gradient", "scheduled", "empirical")
def test_scan_equals_a_loop(tx):
    def step(state, scale):
        updates, state = update(tx, scaled(scale), state, PARAMS)
        return state, updates

    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, jnp.asarray(SCALES)))(tx.init(PARAMS))
    expected, states = plain(tx)
    assert_trees_close(updates, stack(expected))
    assert_trees_close(state, states[-1], rtol=1e-6)


@each_kind_of_state
def test_vmap_over_members_equals_a_loop(tx):
    """A member whose gradient is not finite is rejected alone."""
    members, scales = [make_params(seed=seed) for seed in range(3)], (1.0, jnp.nan, 1e-3)
    step = jax.jit(lambda g, s, p: update(tx, g, s, p))
    gradient = jax.jit(jax.grad(value_fn))
    gradients = [gradient(member, BATCH) for member in members]
    grads = [scaled(scale, tree) for scale, tree in zip(scales, gradients, strict=True)]
    states = jax.vmap(tx.init)(stack(members))
    together = jax.vmap(step)(stack(grads), states, stack(members))
    apart = [step(g, tx.init(p), p) for g, p in zip(grads, members, strict=True)]
    assert_trees_close(together, stack(apart), rtol=1e-6)
    assert together[1].accepted.tolist() == [True, False, True]
    assert types(together[1]) == types(states)


@each_kind_of_state
def test_buffers_of_the_first_state_can_be_donated(tx):
    """No two leaves of the state may be one buffer."""
    add_one = lambda leaf: leaf + jnp.ones((), leaf.dtype)
    next_one = jax.jit(lambda *trees: jax.tree.map(add_one, trees), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    expected = jax.tree.map(add_one, (params, tx.init(params)))
    jax.tree.map(np.testing.assert_array_equal, next_one(params, tx.init(params)), expected)


@over("warm_started", "defaults")
def test_buffers_of_every_step_can_be_donated(tx):
    """The wrapper passes all of them through."""
    tx = optax.apply_if_finite(tx, 3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = update(tx, jax.grad(value_fn)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state)))


def test_eager_call_equals_the_compiled_one():
    state = WARM.init(PARAMS)
    for scale, expected in zip(SCALES[:2], plain(WARM)[0], strict=False):
        updates, state = update(WARM, scaled(scale), state, PARAMS)
        assert_trees_close(updates, expected)


@pytest.mark.parametrize("sharded", ["batch", "params"])
def test_sharding_types_are_those_of_the_parameters(sharded):
    """An explicit mesh, where shardings are part of the types."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    last = lambda leaf: jax.P(*[None] * (leaf.ndim - 1), "x")
    with jax.set_mesh(mesh):
        put = lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))
        spec = last if sharded == "params" else lambda leaf: jax.P()
        params, grads = jax.tree.map(lambda leaf: put(leaf, spec(leaf)), (PARAMS, GRADS))
        batch = put(BATCH, jax.P("x", None) if sharded == "batch" else jax.P())
        state = WARM.init(params)
        updates, after = jax.jit(WARM.update)(grads, state, params, batch=batch)
        assert types(updates) == types(params)
        assert types(after) == types(state)
    assert_trees_close(jax.device_get(updates), plain(WARM)[0][0])


# Wrappers ----------------------------------------------------------------------------------------

ALL = {"layer": {"w": True}, "shift": True}
SOME = {"layer": True, "shift": False}


def retyped(multi_steps):
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)


NEUTRAL_WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("fisher", tx)),
    "masked": lambda tx: optax.masked(tx, ALL),
    "partition": lambda tx: optax.partition({True: tx}, ALL),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step, batch, **_: jnp.all(jnp.isfinite(batch)), forward_extra_args=True
    ),
    "multi_steps": lambda tx: retyped(optax.MultiSteps(tx, 1)),
    "nested": lambda tx: optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.apply_if_finite(optax.masked(optax.named_chain(("fisher", tx)), ALL), 3),
    ),
}


@pytest.mark.parametrize("name", NEUTRAL_WRAPPERS)
def test_neutral_wrapper_changes_nothing(name):
    tx = TRANSFORMS["defaults" if name == "nested" else "warm_started"]
    updates, states = run(NEUTRAL_WRAPPERS[name](tx), all_params=PARAMS)
    assert_diagnostics_are_found(states[-1])
    assert_trees_close(updates, plain(tx)[0])


def test_mask_over_some_leaves_passes_the_others_through():
    tx = optax.masked(WARM, SOME)
    updates, states = run(tx, all_params=PARAMS)
    assert_diagnostics_are_found(states[-1])
    assert_trees_close(updates[0]["shift"], GRADS["shift"])
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, states[-1])
    direction = lambda state: optax.tree.get(state, "direction")["layer"]
    assert_trees_close(direction(doubled), scaled(2, direction(states[-1])))


def test_mask_over_all_leaves_leaves_nothing_to_solve():
    updates, _ = run(optax.masked(WARM, {"layer": False, "shift": False}), all_params=PARAMS)
    assert_trees_close(updates[0], GRADS)


@pytest.mark.parametrize("in_chain", [False, True])
def test_multi_steps_transforms_the_mean_gradient_once_per_cycle(in_chain):
    expected, tx = plain(WARM)[0], optax.MultiSteps(WARM, 3)
    if in_chain:
        tx = optax.chain(optax.identity(), retyped(tx))
    step = jax.jit(lambda g, s, p: update(tx, g, s, p))
    state = tx.init(PARAMS)
    before = types(state)
    for i, scale in enumerate([0.5, 1.0, 1.5, -0.5, 0.0, -1.0]):
        updates, state = step(scaled(scale), state, PARAMS)
        assert types(state) == before
        if i % 3 < 2:
            assert_zeros(updates)
        else:
            assert_trees_close(updates, expected[i // 3], rtol=1e-5)
    assert step._cache_size() == 1
    assert int(optax.tree.get(state, "count")) == 2


def test_apply_if_finite_keeps_a_bad_gradient_from_the_transform():
    tx = optax.apply_if_finite(WARM, 3)
    step = jax.jit(lambda g, s: update(tx, g, s, PARAMS))
    _, state = step(GRADS, tx.init(PARAMS))
    updates, after = step({**GRADS, "shift": GRADS["shift"].at[0].set(jnp.nan)}, state)
    assert_zeros(updates)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


@pytest.mark.parametrize("wrapper", [optax.conditionally_transform, optax.conditionally_mask])
def test_conditional_wrapper_skips_every_other_step(wrapper):
    tx = wrapper(WARM, lambda step: step % 2 == 0)
    step = jax.jit(lambda g, s: update(tx, g, s, PARAMS))
    state = tx.init(PARAMS)
    for i, scale in enumerate(SCALES):
        updates, state = step(scaled(SCALES[i // 2] if i % 2 == 0 else scale), state)
        if i % 2 == 0:
            assert_trees_close(updates, plain(WARM)[0][i // 2])
        elif wrapper is optax.conditionally_transform:
            assert_trees_close(updates, scaled(scale))
        else:
            assert_zeros(updates)
    assert int(optax.tree.get(state, "count")) == 2


LINE_SEARCHES = {
    "backtracking": ([natural_gradient()], optax.scale_by_backtracking_linesearch(8)),
    "zoom": ([scale_by_fisher(), optax.scale(-1.0)], optax.scale_by_zoom_linesearch(8)),
}


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_line_search_scales_the_step(name):
    inner, line_search = LINE_SEARCHES[name]
    values, _, state = descend(optax.chain(*inner, line_search), search=True)
    assert all(after < before for before, after in itertools.pairwise(values))
    assert_diagnostics_are_found(state)
    assert types(state[0]) == types(inner[0].init(PARAMS))


@pytest.mark.parametrize("name", ["schedule_free", "mechanize"])
def test_wrapper_that_drives_the_step_itself_descends(name):
    inner = natural_gradient()
    schedule_free = name == "schedule_free"
    wrap = optax.contrib.schedule_free if schedule_free else optax.contrib.mechanize
    values, params, state = descend(wrap(inner, 0.5) if schedule_free else wrap(inner))
    assert values[-1] < values[0]
    assert_diagnostics_are_found(state)
    if schedule_free:
        evaluated = optax.contrib.schedule_free_eval_params(state, params)
        assert float(value_fn(evaluated, BATCH)) < values[0]


# Hyperparameters ---------------------------------------------------------------------------------


def injected(factory, head=HEAD, **options):
    return optax.inject_hyperparams(factory, static_args=("model_fn",))(
        model_fn=model_fn, head=head, **options
    )


def test_injected_schedules_equal_the_built_in_ones():
    """Everything numeric is traced then, the iteration limit included."""
    tx = injected(fvp.natural_gradient, learning_rate=RATE, damping=DAMPING)
    updates, states = run(tx)
    assert_trees_close(updates, plain(TRANSFORMS["scheduled"])[0], rtol=1e-6)
    np.testing.assert_allclose(states[-1].hyperparams["damping"], DAMPING(len(SCALES) - 1))
    assert int(states[-1].inner_state.count) == len(SCALES)


@pytest.mark.parametrize("scale", [0.7, np.asarray([0.7, 1.0, 2.0])], ids=["number", "array"])
def test_injected_transform_keeps_the_fields_of_its_head(scale):
    head = fvp.Gaussian(scale=scale)
    updates, _ = run(injected(fvp.scale_by_fisher, head, damping=0.1, warm_start=True))
    expected, _ = run(fvp.scale_by_fisher(model_fn, head, damping=0.1, warm_start=True))
    assert_trees_close(updates, expected, rtol=1e-6)


def test_injected_hyperparameters_can_be_changed_between_steps():
    tx = injected(fvp.natural_gradient, learning_rate=0.5, damping=0.1)
    state = tx.init(PARAMS)
    step = jax.jit(lambda s: update(tx, GRADS, s, PARAMS))
    unit, _ = step(state)
    for rate in (0.5, 0.01):
        state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float64)
        updates, _ = step(state)
        assert_trees_close(updates, scaled(rate / 0.5, unit))
    state.hyperparams["damping"] = jnp.asarray(1e6, jnp.float64)  # the direction is grads / damping
    assert_trees_close(step(state)[0], scaled(-0.01 / 1e6), rtol=1e-5)
    assert step._cache_size() == 1


def test_injected_hyperparameters_of_narrow_dtype_keep_the_types():
    tx = injected(fvp.natural_gradient, learning_rate=RATE, damping=DAMPING, warm_start=True)
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    params, grads, batch = narrow(PARAMS), narrow(GRADS), narrow(BATCH)
    step = jax.jit(lambda s: tx.update(grads, s, params, batch=batch))
    state = tx.init(params)
    before = types(state.inner_state)
    for _ in range(2):
        updates, state = step(state)
        assert types(updates) == types(params)
        assert types(state.inner_state) == before
    assert bool(optax.tree.get(state, "accepted"))


# Flax --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [False, True])
def test_nnx_optimizer_forwards_the_batch(warm_start):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, batch):
        return nnx.merge(graphdef, params, rest)(batch)

    tx = fvp.natural_gradient(0.5, apply, HEAD, damping=0.1, warm_start=warm_start)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean(HEAD.nll(model(BATCH), TARGETS))
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, batch=BATCH)
        return value

    values = [float(step(model, optimizer)) for _ in range(4)]
    assert values[3] < values[2] < values[1] < values[0]
    assert bool(optax.tree.get(pure_state(optimizer.opt_state), "accepted"))


def test_linen_parameters_take_a_direct_update():
    linen = pytest.importorskip("flax.linen")
    module = linen.Dense(3, param_dtype=jnp.float64)
    params = module.init(jax.random.key(0), BATCH)
    tx = fvp.natural_gradient(0.5, module.apply, HEAD, damping=0.1)

    @jax.jit
    def step(params, state):
        loss = lambda params: jnp.mean(HEAD.nll(module.apply(params, BATCH), TARGETS))
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[3] < values[2] < values[1] < values[0]
