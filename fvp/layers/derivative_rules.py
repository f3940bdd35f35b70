"""Functions with a derivative rule of their own, held against the derivative of their bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from fvp.jaxprs import bind
from fvp.numerics import widen

CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
_TOLERANCE = 1e-2  # of a cotangent's norm: rounding is smaller, another derivative is larger


def rule_is_of_body(eqn: Any, body: ClosedJaxpr) -> bool:
    """Whether a ``custom_jvp`` or ``custom_vjp`` call differentiates as its body does.

    Where its rule is the derivative of its body, as that of a fused layer or of a stable formula,
    the body may be followed in its place; where the rule is another function, as that of a
    straight-through estimator, it may not. The two are compared while tracing, at random arguments
    of both signs and at positive ones.
    """

    @jax.jit
    def agree(arguments: list[Array], cotangents: list[Array]) -> Array:
        own = _pulled_back(lambda *xs: bind(eqn, xs), arguments, cotangents)
        plain = _pulled_back(jaxpr_as_fun(body), arguments, cotangents)
        results = []
        for a, b in zip(own, plain, strict=True):
            tolerance = max(_TOLERANCE, 10 * float(jnp.finfo(b.dtype).eps))
            a, b = (jnp.nan_to_num(widen(x), posinf=0, neginf=0) for x in (a, b))
            results.append(jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b))
        return jnp.all(jnp.stack(results))

    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        cotangents = [_sample(rng, var.aval) for var in eqn.outvars if _is_float(var.aval)]
        for lowest in (-np.inf, 0.5):
            arguments = [_sample(rng, var.aval, lowest) for var in eqn.invars]
            if not agree(arguments, cotangents):
                return False
    return True


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _sample(rng: np.random.Generator, aval: Any, lowest: float = -np.inf) -> Array:
    """A random array like ``aval``; zeros or keys where it is not of floats."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), aval.shape)
    if not _is_float(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    return jnp.asarray(np.maximum(rng.standard_normal(aval.shape), lowest), aval.dtype)


def _pulled_back(
    function: Callable[..., Sequence[Array]], arguments: list[Array], cotangents: list[Array]
) -> list[Array]:
    """The cotangents of a function's floating outputs, pulled back to its floating arguments."""

    def outputs(floats: list[Array]) -> list[Array]:
        rest = iter(floats)
        out = function(*(next(rest) if _is_float(x) else x for x in arguments))
        return [y for y in out if _is_float(y)]

    _, pullback = jax.vjp(outputs, [x for x in arguments if _is_float(x)])
    return pullback(cotangents)[0]
