"""The diagonal alone."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import FisherCurvature, Problem
from fvp.layers.diagonal import diagonal_of
from fvp.numerics import widen, widen_tree
from fvp.posteriors.structure import Options, Scales, Structure, WhitenedPrecision, total_of
from fvp.typing import Params


@dataclasses.dataclass(frozen=True)
class DiagonalStructure(Structure):
    """The diagonal of H, a tree like the parameters."""

    diagonal: Params

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """By layer rules, see `fvp.fisher_diagonal`."""
        diagonal = diagonal_of(problem, FisherCurvature, options.fallback)
        z = jax.eval_shape(problem.outputs, problem.params)
        total = total_of(problem.total_weight(z))
        return cls(jax.tree.map(lambda x: total.astype(x.dtype) * x, widen_tree(diagonal)))

    def whitened(self, scales: Scales) -> WhitenedPrecision:
        """Entry by entry."""
        return DiagonalWhitened(jax.tree.map(lambda x: 1 + x, scales(scales(self.diagonal))))


@dataclasses.dataclass(frozen=True)
class DiagonalWhitened(WhitenedPrecision):
    """A tree of its entries."""

    entries: Params

    def solve(self, v: Params) -> Params:
        """Divides."""
        return jax.tree.map(lambda x, d: widen(x) / d, v, self.entries)

    def colour(self, noise: Params) -> Params:
        """Divides by the roots."""
        return jax.tree.map(lambda x, d: widen(x) / jnp.sqrt(d), noise, self.entries)

    def variance(self) -> Params:
        """The inverse entries."""
        return jax.tree.map(lambda d: 1 / d, self.entries)

    def logdet(self) -> Array:
        """The sum of their logarithms."""
        return jnp.asarray(sum(jnp.sum(jnp.log(d)) for d in jax.tree.leaves(self.entries)))
