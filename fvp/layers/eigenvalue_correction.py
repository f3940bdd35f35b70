"""EK-FAC: eigenvalues of Kronecker factors, corrected by second moments in their eigenbases."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.layers.captured_batch import CapturedBatch
from fvp.layers.chunks import CHUNK, sum_in_chunks
from fvp.layers.factors import input_sides, output_sides
from fvp.layers.groups import GroupGradients
from fvp.layers.kronecker import KroneckerBlock
from fvp.layers.plans import Plan
from fvp.layers.products import einsum
from fvp.layers.squares import squared_lookup

if TYPE_CHECKING:
    from jaxtyping import Float


def with_corrected_eigenvalues(
    captured: CapturedBatch, plans: list[Plan], blocks: list[KroneckerBlock]
) -> list[KroneckerBlock]:
    """The eigenvalues become the second moments of the gradients in the eigenbases."""
    bases = [block.eigenbases() for block in blocks]
    turn = lambda x, basis: x if basis is None else einsum("...gi,gij->...gj", x, basis)

    def moments(groups: list[GroupGradients]) -> list[Array]:
        found = []
        for plan, (left, right) in zip(plans, bases, strict=True):
            xs, pairs = input_sides(captured, plan, reduce=False), []
            outputs = output_sides(captured, plan, groups)
            for x, delta, swapped in zip(xs, outputs, plan.swapped, strict=True):
                a, b = (delta, x.x) if swapped else (x.x, delta)
                pairs.append((turn(a, left), turn(b, right)))
            found.append(_squares(pairs, plan.layouts[0].shape[1]))
        return found

    values = captured.sum(moments)
    return [
        dataclasses.replace(block, corrected=value, bases=basis)
        for block, value, basis in zip(blocks, values, bases, strict=True)
    ]


def _squares(pairs: list[tuple[Array, Array]], size: int) -> Float[Array, "G I O"]:
    """Sum over columns and examples of the squared gradients, sums of products of these pairs.

    A side is (E, R, G, ...) or (K, E, R, G, ...), or it is indices (E, R, G) into ``size`` entries.
    """
    a, b = pairs[0]
    if len(pairs) == 1 and a.ndim == 3:
        return squared_lookup(size, a, b)
    if len(pairs) == 1 and b.shape[-3] == 1:
        return einsum("ergi,ergo->gio", a**2, jnp.sum(b**2, axis=0))
    pairs = [(jax.nn.one_hot(a, size, dtype=b.dtype) if a.ndim == 3 else a, b) for a, b in pairs]
    columns = max(x.shape[0] for pair in pairs for x in pair if x.ndim == 5)
    spread = lambda x: jnp.broadcast_to(x, (columns, *x.shape[-4:]))
    data = [tuple(jnp.moveaxis(spread(x), 1, 0) for x in pair) for pair in pairs]

    def some(data: Any) -> Array:
        gradient = sum(einsum("ekrgi,ekrgo->ekgio", a, b) for a, b in data)
        return jnp.sum(jnp.square(gradient), axis=(0, 1))

    a, b = data[0]
    entries = columns * a.shape[-1] * b.shape[-1] * b.shape[-2]
    return sum_in_chunks(some, data, max(1, CHUNK // entries))
