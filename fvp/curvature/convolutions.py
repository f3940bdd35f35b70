"""Convolutions in the layout that is fast inside loops on CPU.

XLA turns convolutions into the layout of its fast kernels only outside of loops, and the transposes
that derivatives are made of have other ones: a product inside conjugate gradients took five times
as long as outside (jax issue 12868). Here each is written in that layout, with its transpositions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun

from fvp.compatibility import JIT, bind


def fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its convolutions, those of inner ``jit`` included, written anew."""

    def rewritten(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = jax.tree.leaves(args)
        if _convolves(closed.jaxpr):
            results = _evaluate(closed, flat)
        else:
            results = jaxpr_as_fun(closed)(*flat)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rewritten if jax.default_backend() == "cpu" else function


def _convolves(jaxpr: Jaxpr) -> bool:
    inner = (equation.params["jaxpr"] for equation in jaxpr.eqns if _is_jit(equation))
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return "conv_general_dilated" in names or any(_convolves(closed.jaxpr) for closed in inner)


def _is_jit(equation: Any) -> bool:
    return equation.primitive.name in JIT


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    """The values of ``closed``, one equation after the other."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "conv_general_dilated":
            results = [_convolve(*operands, **equation.params)]
        elif _is_jit(equation) and _convolves(equation.params["jaxpr"].jaxpr):
            results = _evaluate(equation.params["jaxpr"], operands)
        else:
            results = bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(x: Array, kernel: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """The convolution with (batch, space, features) and (space, in, out) in this order."""
    count, space = x.ndim, range(1, x.ndim - 1)
    batch_last, out_first, result = dimension_numbers
    x = jnp.transpose(x, (batch_last[0], *batch_last[2:], batch_last[1]))
    kernel = jnp.transpose(kernel, (*out_first[2:], out_first[1], out_first[0]))
    activations = (0, count - 1, *space)
    weights = (count - 1, count - 2, *range(count - 2))
    numbers = jax.lax.ConvDimensionNumbers(activations, weights, activations)
    padding, strides = params.pop("padding"), params.pop("window_strides")
    params.pop("out_sharding", None)
    z = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **params
    )
    return jnp.transpose(z, np.argsort((result[0], *result[2:], result[1])).tolist())
