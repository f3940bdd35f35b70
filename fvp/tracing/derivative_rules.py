"""Functions with a derivative rule of their own, held against the derivative of their bodies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from fvp.compatibility import bind
from fvp.numerics import widen
from fvp.tracing.jaxprs import Equation, Jaxpr

CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
# docs/decisions/layers.md
_SCALES = (1.0, 10.0, 100.0)  # of the arguments: a rule may clip what is far out only
_OFFSET = 0.5  # of positive arguments: at zero roots and logarithms have no derivative
_DIGITS = 0.5  # the share of the digits that must agree
_CANCELLED = 64  # units in the last place of the largest derivative that cancellation may leave


def rule_is_of_body(
    eqn: Equation, body: Jaxpr, operands: Sequence[Array], varies: Sequence[bool]
) -> bool:
    """Whether a ``custom_jvp`` or ``custom_vjp`` call differentiates as its body does.

    Where its rule is the derivative of its body, as that of a fused layer or of a stable formula,
    the body may be followed in its place; where the rule is another function, as that of a
    straight-through estimator, it may not. The two are compared while tracing, at random arguments
    of several sizes, of both signs and positive. They must agree to half of the digits, entry by
    entry where the body's derivative is finite. Operands that do not vary, with parameters or the
    batch, keep the values ``operands``; there is no derivative to compare.
    """
    varies = [
        variable and _is_float(x.aval) for x, variable in zip(eqn.invars, varies, strict=True)
    ]

    @jax.jit
    def agree(arguments: list[Array], cotangents: list[Array]) -> Array:
        own = _transpose_products(lambda *xs: bind(eqn, xs), arguments, cotangents, varies)
        plain = _transpose_products(jaxpr_as_fun(body), arguments, cotangents, varies)
        return _agree(own, plain)

    pairs = zip(operands, varies, strict=True)
    fixed = [not variable and not isinstance(x, Tracer) for x, variable in pairs]
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        cotangents = [_sample(rng, var.aval) for var in eqn.outvars if _is_float(var.aval)]
        for scale, positive in itertools.product(_SCALES, (False, True)):
            arguments = [
                x if known else _sample(rng, var.aval, scale, positive)
                for x, known, var in zip(operands, fixed, eqn.invars, strict=True)
            ]
            if not agree(arguments, cotangents):
                return False
    return True


def _agree(own: Sequence[Array], plain: Sequence[Array]) -> Array:
    """Whether two lists of derivatives agree, each where the second, ``plain``, is finite."""
    pairs = []
    for a, b in zip(own, plain, strict=True):
        usable = jnp.isfinite(b)
        pairs.append([jnp.where(usable, widen(x), 0) for x in (a, b)])
    norm = lambda x: jnp.sqrt(jnp.sum(x**2))
    largest = jnp.max(jnp.stack([norm(b) for _, b in pairs]))
    results = []
    for (a, b), derivative in zip(pairs, plain, strict=True):
        eps = float(jnp.finfo(derivative.dtype).eps)
        # A derivative that is small because large terms cancel has their rounding.
        tolerance = eps**_DIGITS * norm(b) + _CANCELLED * eps * largest
        results.append(norm(a - b) <= tolerance)
    return jnp.all(jnp.stack(results))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _sample(
    rng: np.random.Generator, aval: Any, scale: float = 1.0, positive: bool = False
) -> Array:
    """A random array like ``aval``, no two entries equal; zeros or keys where it has no floats."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), aval.shape)
    if not _is_float(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    values = rng.standard_normal(aval.shape)
    return jnp.asarray(scale * (np.abs(values) + _OFFSET if positive else values), aval.dtype)


def _transpose_products(
    function: Callable[..., Sequence[Array]],
    arguments: list[Array],
    cotangents: list[Array],
    varies: Sequence[bool],
) -> list[Array]:
    """J^T times the cotangents of the floating outputs, for J in the arguments that vary."""

    def outputs(variables: list[Array]) -> list[Array]:
        rest, pairs = iter(variables), zip(arguments, varies, strict=True)
        out = function(*(next(rest) if variable else x for x, variable in pairs))
        return [y for y in out if _is_float(y)]

    variables = [x for x, variable in zip(arguments, varies, strict=True) if variable]
    _, vjp = jax.vjp(outputs, variables)
    return vjp(cotangents)[0]
