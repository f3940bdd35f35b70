"""A product, a solve and three steps with what the wheel alone installs: jax and optax."""

import importlib.util

import jax
import jax.numpy as jnp
import optax

import fvp

assert importlib.util.find_spec("flax") is None
assert importlib.util.find_spec("fvp").origin.endswith("site-packages/fvp/__init__.py")
x, y = jnp.eye(3), jnp.array([0, 1, 1])
model_fn, head, params = lambda w, x: x @ w, fvp.Softmax(), jnp.zeros((3, 2))
F = fvp.fisher(model_fn, head, params, x)
solution, info = fvp.cg(F, F @ jnp.ones((3, 2)) + params, damping=0.1)
assert bool(info.converged)
loss = lambda params: head.nll(model_fn(params, x), y).mean()
tx = fvp.natural_gradient(1.0, model_fn, head)
state, before = tx.init(params), loss(params)
for _ in range(3):
    updates, state = tx.update(jax.grad(loss)(params), state, params, batch=x, targets=y)
    params = optax.apply_updates(params, updates)
assert loss(params) < 0.5 * before
print(f"fvp {fvp.__version__} on jax {jax.__version__}: loss {before:.3f} to {loss(params):.3f}")
