"""The largest eigenvalues alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.curvature import Problem
from fvp.estimation import eigenpairs
from fvp.factorization import eigh_semidefinite
from fvp.numerics import widen_tree
from fvp.posteriors.structure import Options, Scales, Structure, WhitenedPrecision, summed_fisher
from fvp.typing import Params

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class LowRankStructure(Structure):
    """H = R^T R, with rows R (rank, P) in the order of ``ravel_pytree``."""

    rows: Array

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """From the eigenvectors of the largest eigenvalues, see `fvp.eigenpairs`."""
        operator, total = summed_fisher(problem)
        size = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        values, vectors = eigenpairs(operator, min(options.rank, size), options.key)
        rows = jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)
        return cls(jnp.sqrt(total * jnp.maximum(values, 0))[:, None] * rows)

    def whitened(self, scales: Scales) -> WhitenedPrecision:
        """Factorised by the eigenvalues of the (rank, rank) Gram matrix of the rows."""
        rows = self.rows * scales.vector()
        values, vectors = eigh_semidefinite(_matmul(rows, rows.T))
        return LowRankWhitened(_matmul(vectors.T, rows), values, scales.like)


@dataclasses.dataclass(frozen=True)
class LowRankWhitened(WhitenedPrecision):
    """I + R^T R with orthogonal rows R, of squared lengths ``values``."""

    rows: Array
    values: Array
    like: Params

    def solve(self, v: Params) -> Params:
        """Woodbury: v - R^T (I + R R^T)^-1 R v."""
        return self._corrected(v, -1 / (1 + self.values))

    def colour(self, noise: Params) -> Params:
        """The symmetric root, I + R^T f R with f = ((1 + s)^(-1/2) - 1) / s for s = R R^T."""
        t = 1 + self.values
        return self._corrected(noise, -1 / (t + jnp.sqrt(t)))

    def variance(self) -> Params:
        """One, less what the data tell."""
        _, unravel = ravel_pytree(widen_tree(self.like))
        return unravel(1 - jnp.sum(self.rows**2 / (1 + self.values)[:, None], axis=0))

    def logdet(self) -> Array:
        """Of the Gram matrix."""
        return jnp.sum(jnp.log1p(self.values))

    def _corrected(self, v: Params, factor: Array) -> Params:
        """(I + R^T diag(factor) R) v."""
        flat, unravel = ravel_pytree(widen_tree(v))
        flat += _matmul(factor * _matmul(self.rows, flat), self.rows)
        return unravel(flat)
