"""Bad batches: whatever comes in, every number of the state stays finite, and training recovers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import rarely

import fvp

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()
# What is done to the gradient, the inputs, the labels or the weights of a step; 0 is nothing.
FAULTS = (
    "none",
    "gradient is NaN",
    "gradient is inf",
    "one entry is 1e25",
    "gradient is huge",
    "gradient is tiny",
    "gradient is zero",
    "inputs are NaN",
    "inputs are huge",
    "one row is NaN",
    "all rows masked",
    "rows of no weight hold NaN",
    "one class",
    "zero inputs",
)


def natural_gradient(model, **options):
    """With the rule of full batches: of that for noise "defaults" is enough."""
    return fvp.natural_gradient(1.0, model, HEAD, damping=fvp.LevenbergMarquardt(), **options)


CONFIGURATIONS = {
    "defaults": lambda model: fvp.natural_gradient(1.0, model, HEAD),
    "untried": lambda model: natural_gradient(model),
    "dense": lambda model: natural_gradient(model, solver="dense"),
    "dual": lambda model: natural_gradient(model, solver="dual"),
    "max_kl": lambda model: fvp.natural_gradient(1.0, model, HEAD, max_kl=0.01),
    "geodesic": lambda model: fvp.natural_gradient(1.0, model, HEAD, geodesic=True),
    "plane": lambda model: natural_gradient(model, momentum="quadratic"),
    "search": lambda model: fvp.natural_gradient(
        1.0, model, HEAD, solver="dense", line_search="loss"
    ),
    "number": lambda model: fvp.natural_gradient(1.0, model, HEAD, damping=0.5, warm_start=True),
    "kfac": lambda model: optax.chain(fvp.scale_by_kfac(model, HEAD), optax.scale(-1.0)),
    "kfac averages": lambda model: optax.chain(
        fvp.scale_by_kfac(model, HEAD, example_batch=jnp.zeros((8, 3), jnp.float32)),
        optax.scale(-1.0),
    ),
}


def model(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def problem():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    y = jnp.asarray(x[:, 0] * x[:, 1] > 0, jnp.int32)
    shapes = {"in": (3, 6), "out": (6, 2)}
    params = {k: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return params, x, y


def with_fault(fault, gradient, x, y, weights):
    """One batch with the fault of that number."""
    code = FAULTS.index
    is_now = lambda name: fault == code(name)
    row = jnp.arange(len(x))[:, None] == 0
    factors = {"gradient is NaN": jnp.nan, "gradient is inf": jnp.inf, "gradient is huge": 1e30}
    factors |= {"gradient is tiny": 1e-30, "gradient is zero": 0.0}
    for name, factor in factors.items():
        gradient = jax.tree.map(
            lambda g, n=name, f=factor: jnp.where(is_now(n), g * f, g), gradient
        )
    spike = gradient["in"].at[0, 0].set(1e25)
    gradient = {**gradient, "in": jnp.where(is_now("one entry is 1e25"), spike, gradient["in"])}
    x = jnp.where(is_now("inputs are NaN"), jnp.nan, x)
    x = jnp.where(is_now("inputs are huge"), 1e30 * x, x)
    x = jnp.where(
        (is_now("one row is NaN") | is_now("rows of no weight hold NaN")) & row, jnp.nan, x
    )
    x = jnp.where(is_now("zero inputs"), 0 * x, x)
    weights = jnp.where(is_now("all rows masked"), 0, weights)
    weights = jnp.where(is_now("rows of no weight hold NaN") & row[:, 0], 0, weights)
    y = jnp.where(is_now("one class"), 0 * y, y)
    return gradient, x, y, weights


RARE = ("untried", "dual", "geodesic", "plane", "number", "kfac")


@pytest.mark.parametrize(
    "name", [rarely(name) if name in RARE else name for name in CONFIGURATIONS]
)
def test_the_state_stays_finite_and_training_recovers(name):
    tx = CONFIGURATIONS[name](model)
    params, x, y = problem()
    ones = jnp.ones(len(x))
    loss = lambda params, x, y: HEAD.nll(model(params, x), y).mean()
    tried = {} if name == "untried" else {"targets": y}

    def step(carry, fault):
        params, state = carry
        gradient = jax.grad(loss)(params, x, y)
        gradient, bad_x, bad_y, weights = with_fault(fault, gradient, x, y, ones)
        data = {"targets": bad_y} if tried else {}
        updates, state = tx.update(gradient, state, params, batch=bad_x, weights=weights, **data)
        params = optax.apply_updates(params, updates)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state))]
        return (params, state), jnp.stack(finite).all()

    rng = np.random.default_rng(1)
    faults = np.where(rng.random(300) < 0.6, rng.integers(1, len(FAULTS), 300), 0)
    assert set(faults) == set(range(len(FAULTS)))
    run = jax.jit(lambda carry, faults: jax.lax.scan(step, carry, faults))
    carry, finite = run((params, tx.init(params)), jnp.asarray(faults))
    assert finite.all(), [FAULTS[faults[i]] for i in np.flatnonzero(~finite)[:1]]
    (recovered, _), _ = run(carry, jnp.zeros(300, int))
    assert loss(recovered, x, y) < 0.3 * loss(params, x, y)
