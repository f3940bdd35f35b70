"""Covariances of the outputs z of a model that is linearised in its random parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import Problem
from fvp.curvature.chunked import example_axes, example_count
from fvp.curvature.linearization import Linearization
from fvp.layers.chunks import CHUNK
from fvp.layers.products import einsum
from fvp.numerics import widen
from fvp.posteriors.structure import Scales, Structure, WhitenedPrecision
from fvp.typing import Params


def output_covariance(
    problem: Problem,
    structure: Structure,
    precision: WhitenedPrecision,
    scales: Scales,
    full: bool,
) -> tuple[Array, Array]:
    """The outputs (N, ...), and the variances of each of their entries.

    With ``full`` the covariances (batch axes, entries of an event, entries of an event). One
    example at a time, or a few: its Jacobian is all that is held.
    """
    part, head = structure.random(problem.params), problem.head
    take = _example_of(problem)

    def one(i: Array) -> tuple[Array, Array]:
        outputs = lambda part: problem.model(structure.fill(problem.params, part), take(i))
        model = Linearization.of(outputs, part)
        z = model.output
        head.check_outputs(z)
        if z.shape[0] != 1:
            raise ValueError(
                "batch: expected a model whose outputs have the example axis first, got shape"
                f" {z.shape} for one example."
            )
        units = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
        rows = jax.vmap(lambda u: scales(model.vjp(u)))(units)
        solved = jax.vmap(precision.solve)(rows)
        event = math.prod(z.shape[z.ndim - head.event_ndim :])
        return z[0], _inner_products(rows, solved, event, full)

    count = example_count(problem)
    shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32))
    size = shapes[0].size * sum(leaf.size for leaf in jax.tree.leaves(part))
    batch_size = min(count, max(1, CHUNK // size))
    z, products = jax.lax.map(one, jnp.arange(count), batch_size=batch_size)
    shape = head.batch_shape(z) + products.shape[2:] if full else z.shape
    return z, products.reshape(shape)


def _example_of(problem: Problem) -> Callable[[Array], Params]:
    """The batch of one example, by its number."""
    leaves, structure = jax.tree.flatten(problem.batch)
    axes = example_axes(problem)

    def take(i: Array) -> Params:
        pairs = zip(leaves, axes, strict=True)
        slices = [
            x if axis is None else jax.lax.dynamic_slice_in_dim(jnp.asarray(x), i, 1, axis)
            for x, axis in pairs
        ]
        return jax.tree.unflatten(structure, slices)

    return take


def _inner_products(rows: Params, solved: Params, event: int, full: bool) -> Array:
    """Of rows of the same event: (events, event, event), or (events, event) for equal ones."""
    pattern = "rdp,rep->rde" if full else "rdp,rdp->rd"

    def product(a: Array, b: Array) -> Array:
        shape = (a.shape[0] // event, event, -1)
        return einsum(pattern, widen(a).reshape(shape), widen(b).reshape(shape))

    return sum(jax.tree.leaves(jax.tree.map(product, rows, solved)), jnp.zeros(()))
