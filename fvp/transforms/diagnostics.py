"""What the last step did, as numbers for a logger and as a sentence for a reader."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from fvp.checks import counted
from fvp.compatibility import pure_state
from fvp.transforms.state import NaturalGradientState


def diagnostics(state: Any) -> dict[str, Array]:
    """The last step of a transformation of fvp, as a flat dict of scalars.

    Args:
      state: the optimizer state that holds one of fvp's, under any wrappers of optax; also that of
        an ``nnx.Optimizer``.

    Returns:
      Scalar arrays by name, for TensorBoard and the like; inside ``jit`` they are traced. ``step``
      counts updates; ``accepted`` and ``gradient_mismatch`` are 0 or 1; ``damping``,
      ``iterations``, ``residual_norm`` and ``predicted_kl`` are those of the last step. Where
      nothing was set that the rule for noise would override: ``noise_leads`` (0 or 1),
      ``fitted_noise``, the part of what steps claimed on their own batches that fresh batches did
      not confirm, ``length``, what is learned under noise, and ``waiting``, the gradients that the
      next step will average.

    Raises:
      ValueError: for a state without one of fvp's, or with several, as of ``optax.partition``.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> model_fn, head, w, x = lambda w, x: x @ w, fvp.Gaussian(), jnp.ones((2, 1)), jnp.eye(2)
      >>> tx = fvp.natural_gradient(1.0, model_fn, head, damping=0.5)
      >>> _, state = tx.update(w, tx.init(w), w, batch=x)
      >>> {name: float(value) for name, value in fvp.diagnostics(state).items()}["damping"]
      0.5
    """
    found = _found(state)
    numbers = {
        "step": found.count,
        "accepted": found.accepted,
        "damping": found.damping,
        "iterations": found.iterations,
        "residual_norm": found.residual_norm,
        "predicted_kl": found.predicted_kl,
        "gradient_mismatch": found.gradient_mismatch,
    }
    if found.noise is not None:
        claims = found.noise.claims
        claimed = jnp.where(claims.claimed > 0, claims.claimed, 1)
        numbers |= {
            "noise_leads": found.noise.leads,
            "fitted_noise": claims.refuted / claimed,
            "length": found.noise.learned.length,
            "waiting": found.noise.waiting,
        }
    as_number = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bool_ else x
    return {name: as_number(jnp.asarray(value)) for name, value in numbers.items()}


def describe(state: Any) -> str:
    """The last step of a transformation of fvp in words.

    Args:
      state: as for `diagnostics`, with concrete arrays.

    Raises:
      ValueError: as for `diagnostics`; for traced arrays, which have no values to print; and for
        the stacked states of several models.

    Examples:
      >>> import jax, jax.numpy as jnp, fvp
      >>> model_fn, head, w, x = lambda w, x: x @ w, fvp.Gaussian(), jnp.ones((2, 1)), jnp.eye(2)
      >>> tx = fvp.natural_gradient(1.0, model_fn, head, damping=0.5)
      >>> _, state = tx.update(w, tx.init(w), w, batch=x)
      >>> print(fvp.describe(state))
      step 1: accepted; damping 0.5, 1 iteration, residual 0, predicted KL divergence 0.5
    """
    numbers = diagnostics(state)
    if any(isinstance(value, Tracer) for value in numbers.values()):
        raise ValueError("state: expected concrete arrays to describe; under jit take diagnostics")
    if numbers["step"].ndim:
        raise ValueError("state: expected that of one model to describe, got stacked ones")
    value = {name: float(number) for name, number in numbers.items()}
    step = f"step {value['step']:.0f}: "
    if not value["step"]:
        return step + "nothing was done yet"
    if value.get("noise_leads"):
        verdict = "a step to the average of iterates"
        if waiting := int(value["waiting"]):
            verdict = f"{counted(waiting, 'gradient')} waiting for one step"
        if not value["accepted"]:
            verdict = "rejected, not finite"
        return step + f"noise leads; {verdict}, length {value['length']:.3g}"
    text = step + ("accepted" if value["accepted"] else "rejected, the update is zero")
    text += f"; damping {value['damping']:.3g}, {counted(int(value['iterations']), 'iteration')}"
    text += f", residual {value['residual_norm']:.3g}"
    text += f", predicted KL divergence {value['predicted_kl']:.3g}"
    if value["gradient_mismatch"]:
        text += "; the gradient is not that of the loss at targets=: pass its loss as value_fn="
    if value.get("fitted_noise", 0) > 0:
        text += f"; {value['fitted_noise']:.0%} of what steps claimed was noise"
    noise = _found(state).noise
    # A step that is accepted on a loss leaves its claim and its square behind.
    if (
        noise is not None
        and value["accepted"]
        and not noise.claims.known
        and noise.last.square == 0
    ):
        text += "; the loss is unknown, so that noise is not looked for: pass targets= or value_fn="
    return text


def _found(state: Any) -> NaturalGradientState:
    """The one state of fvp in ``state``, with plain arrays in it."""
    is_one = lambda x: isinstance(x, NaturalGradientState)
    states = lambda tree: [x for x in jax.tree.leaves(tree, is_leaf=is_one) if is_one(x)]
    if any(map(_is_of_flax, jax.tree.leaves(state, is_leaf=_is_of_flax))):
        state = pure_state(state)
    found = states(state)
    if len(found) != 1:
        number = "several" if found else "none"
        raise ValueError(f"state: expected the state of one transformation of fvp, found {number}")
    return found[0]


def _is_of_flax(x: Any) -> bool:
    """Whether ``x`` is an optimizer or a variable of Flax NNX."""
    return type(x).__module__.startswith("flax.")
