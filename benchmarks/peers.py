"""One optimizer on one task of tasks.py, in a process of its own; prints a JSON object.

    python benchmarks/peers.py --task digits --method adam --options '{"learning_rate": 0.01}'

no_tuning.py starts it, for kfac-jax and somax with the interpreter of an environment that has them.
Seconds are of the steps alone: compilation is measured apart, and the evaluations of the loss are
off the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import timed
from tasks import TASKS, UNTRAINABLE, Task

EVALUATIONS = 120  # before the equal ones among the first steps are merged
MOMENTUM = 0.9
DENSE_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer of one task."""

    init: Callable[[Any, Any], Any]  # params, batch -> state
    step: Callable[[Any, Any, Iterator[Any]], tuple[Any, Any]]  # params, state, batches
    products: Callable[[Any], float] = lambda state: math.nan  # CG iterations so far, where known
    warm_up: int = 1  # steps after which everything is compiled


def natural_gradient(task: Task) -> Method:
    """Fvp with nothing set; the gradient and the curvature share one linearisation."""
    import fvp

    model_fn, head = task.model_fn, head_of(task)
    tx = fvp.natural_gradient(1.0, model_fn, head)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        inputs, targets, weights = batch
        state, products = state
        F = fvp.fisher(model_fn, head, params, inputs, weights=weights)
        _, grads = F.value_and_grad(targets)
        updates, state = tx.update(
            grads, state, params, operator=F, batch=inputs, targets=targets, weights=weights
        )
        products += optax.tree.get(state, "iterations")
        return optax.apply_updates(params, updates), (state, products)

    return Method(
        init=lambda params, batch: (tx.init(params), jnp.int32(0)),
        step=lambda params, state, batches: step(params, state, next(batches)),
        products=lambda state: int(state[1]),
    )


def kfac(task: Task) -> Method:
    """K-FAC of fvp with nothing set; like kfac-jax it is shown a batch before the first step."""
    import fvp

    shown, _, _ = task.rows(slice(task.batch_size))
    precondition = fvp.scale_by_kfac(task.model_fn, head_of(task), example_batch=shown)
    tx = optax.chain(precondition, optax.scale(-1.0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # as kfac-jax does
    def step(params: Any, state: Any, batch: Any) -> Any:
        inputs, targets, weights = batch
        grads = jax.grad(task.loss)(params, *batch)
        updates, state = tx.update(
            grads, state, params, batch=inputs, targets=targets, weights=weights
        )
        return optax.apply_updates(params, updates), state

    return Method(
        init=lambda params, batch: tx.init(params),
        step=lambda params, state, batches: step(params, state, next(batches)),
    )


def head_of(task: Task) -> Any:
    """The task's loss in fvp."""
    import fvp

    return {"softmax": fvp.Softmax, "sigmoid": fvp.Sigmoid, "gaussian": fvp.Gaussian}[task.head]()


def first_order(task: Task, tx: optax.GradientTransformation) -> Method:
    """An optax transformation of the gradient."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(task.loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return Method(
        init=lambda params, batch: tx.init(params),
        step=lambda params, state, batches: step(params, state, next(batches)),
        products=lambda state: 0,
    )


def adam(task: Task, learning_rate: float) -> Method:
    """Adam with a constant learning rate."""
    return first_order(task, optax.adam(learning_rate))


def sgd(task: Task, learning_rate: float) -> Method:
    """Gradient descent with momentum."""
    return first_order(task, optax.sgd(learning_rate, MOMENTUM))


def kfac_jax(task: Task, initial_damping: float = 1.0, damping: float | None = None) -> Method:
    """K-FAC as in its README: learning rate and momentum adapt, and damping if it is not given."""
    kfac = importlib.import_module("kfac_jax")
    register = {
        "softmax": kfac.register_softmax_cross_entropy_loss,
        "sigmoid": kfac.register_sigmoid_cross_entropy_loss,
        "gaussian": kfac.register_squared_error_loss,
    }[task.head]

    def loss(params: Any, batch: Any) -> jax.Array:
        inputs, targets, weights = batch
        z = task.model_fn(params, inputs)
        rows = math.prod(z.shape[1:-1])  # of an example: kfac-jax means a sum over them
        register(scaled(z, weights), weight=(0.5 if task.head == "gaussian" else 1.0) / rows)
        return task.loss_of(z, targets, weights)

    optimizer = kfac.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=damping is None,
        initial_damping=initial_damping,
        damping_schedule=None if damping is None else lambda _: jnp.asarray(damping),
    )

    def init(params: Any, batch: Any) -> Any:
        return optimizer.init(params, jax.random.PRNGKey(0), batch), jax.random.PRNGKey(1), 0

    def step(params: Any, state: Any, batches: Iterator[Any]) -> Any:
        state, key, count = state
        key, now = jax.random.split(key)
        params, state, _ = optimizer.step(
            params, state, now, data_iterator=batches, global_step_int=count
        )
        return params, (state, key, count + 1)

    # Every fifth step, which adapts the damping, is another program.
    return Method(init, step, warm_up=6)


def somax(task: Task, preset: str, **options: Any) -> Method:
    """A preset of somax, with the tolerance and iterations of its README."""

    def predict(params: Any, x: Any) -> jax.Array:
        inputs, weights = x
        z = task.model_fn(params, inputs)
        return scaled(z.reshape(-1, z.shape[-1]), weights)

    method = importlib.import_module("somax").make(
        preset,
        predict_fn=predict,
        loss_fn=lambda params, batch: task.loss(params, *batch["all"]),
        tol=1e-4,
        maxiter=20,
        **options,
    )

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        inputs, targets, weights = batch
        y = scaled(targets, weights) if task.head == "gaussian" else targets.reshape(-1)
        batch = {"x": (inputs, weights), "y": y, "all": batch}
        key = jax.random.fold_in(jax.random.PRNGKey(0), state.step)
        params, state, _ = method.step(params, batch, state, key)
        return params, state

    return Method(
        init=lambda params, batch: method.init(params),
        step=lambda params, state, batches: step(params, state, next(batches)),
    )


def scaled(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Rows of a squared error without weights that equals one with them."""
    return x if weights is None else x * jnp.sqrt(weights / weights.mean())[:, None]


def candidates(peer: str, task: Task) -> list[dict[str, Any]]:
    """Options of a peer: the documented ones, then a grid around them."""
    if peer == "kfac-jax":
        initial = [{"initial_damping": 10.0**k} for k in (0, -3, -2, -1, 1)]
        return initial + [{"damping": 10.0**k} for k in (-3, -2, -1)]
    presets = {
        "softmax": ["sgn_ce", "egn_ce"],
        "sigmoid": ["newton_cg"],  # it has no Gauss-Newton method for this head
        "gaussian": ["sgn_mse", "egn_mse"],
    }[task.head]
    z = jax.eval_shape(task.model_fn, task.init(0), task.rows(slice(task.batch_size))[0])
    if z.size > DENSE_ROWS:
        presets = presets[:1]  # an egn method takes a product for each output of a batch
    grid = [
        {"preset": preset, "learning_rate": learning_rate, "lam0": lam0}
        for preset in presets
        for learning_rate in (0.1, 1.0)
        for lam0 in (1e-3, 1e-1)
    ]
    regions = [
        {"preset": preset, "learning_rate": 1.0, "lam0": 1.0, "lam_policy": "trust_region"}
        for preset in presets
    ]
    return [{"preset": presets[0], "learning_rate": 0.1, "lam0": 1e-2}, *grid, *regions]


METHODS: dict[str, Callable[..., Method]] = {
    "fvp": natural_gradient,
    "fvp-kfac": kfac,
    "adam": adam,
    "sgd": sgd,
    "kfac-jax": kfac_jax,
    "somax": somax,
}
PEERS = {
    "kfac-jax": ("kfac-jax==0.0.8", "jax==0.9.1", "jaxlib==0.9.1", "scikit-learn>=1.6"),
    "somax": ("python-somax==1.0.1", "jax==0.10.1", "jaxlib==0.10.1", "scikit-learn>=1.6"),
}


def race(
    task: Task, method: Method, seed: int, steps: int, seconds: float = math.inf
) -> dict[str, Any]:
    """The curve of a training run that ends after so many steps or seconds.

    It is evaluated at about evenly spaced logarithms of the step. Its points are steps, seconds,
    products and loss.
    """
    fresh = lambda: jax.tree.map(jnp.array, task.init(seed))

    def steps_on(batches: Iterator[Any], params: Any, state: Any, count: int) -> tuple[Any, Any]:
        for _ in range(count):
            params, state = method.step(params, state, batches)
        return params, state

    def first_steps(params: Any, batches: Iterator[Any]) -> tuple[Any, Any]:
        state = method.init(params, next(task.batches(seed)))
        return steps_on(batches, params, state, method.warm_up)

    _, compile_seconds = timed(first_steps, fresh(), task.batches(seed))

    evaluation = jax.device_put(task.rows(slice(task.evaluation_rows)))
    loss = jax.jit(task.loss)
    params, batches = fresh(), task.batches(seed)
    state = method.init(params, next(task.batches(seed)))
    curve = [(0, 0.0, 0.0, float(loss(params, *evaluation)))]
    stops = np.unique(np.geomspace(1, steps, EVALUATIONS).round().astype(int)).tolist()
    elapsed = 0.0
    for before, stop in zip([0, *stops], stops, strict=False):
        (params, state), seconds_taken = timed(steps_on, batches, params, state, stop - before)
        elapsed += seconds_taken
        curve.append((stop, elapsed, method.products(state), float(loss(params, *evaluation))))
        if elapsed > seconds or not math.isfinite(curve[-1][-1]):
            break
    return {"compile_seconds": compile_seconds, "curve": curve}


def main() -> None:
    """Command line."""
    tasks = TASKS | UNTRAINABLE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", choices=tasks, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of the method, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="the task's own if not given")
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    task = tasks[arguments.task]()
    jax.config.update("jax_enable_x64", task.x64)
    try:
        method = METHODS[arguments.method](task, **arguments.options)
        steps = arguments.steps or task.steps
        result = race(task, method, arguments.seed, steps, arguments.seconds)
    except Exception as error:
        result = {"error": traceback.format_exception_only(error)[0].splitlines()[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
