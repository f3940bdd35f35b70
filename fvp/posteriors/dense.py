"""The whole matrix."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_solve, solve_triangular

from fvp.curvature import Problem
from fvp.numerics import widen, widen_tree
from fvp.posteriors.structure import Options, Scales, Structure, WhitenedPrecision, summed_fisher
from fvp.typing import Params


@dataclasses.dataclass(frozen=True)
class DenseStructure(Structure):
    """H as a (P, P) matrix in the order of ``ravel_pytree``."""

    matrix: Array

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """From the Jacobian of all examples."""
        del options
        operator, total = summed_fisher(problem)
        return cls(total * widen(operator.dense()))

    def whitened(self, scales: Scales) -> WhitenedPrecision:
        """Factorised by Cholesky."""
        s = scales.vector()
        identity = jnp.eye(s.size, dtype=self.matrix.dtype)
        root = jnp.linalg.cholesky(identity + s[:, None] * self.matrix * s)
        return DenseWhitened(root, scales.like)


@dataclasses.dataclass(frozen=True)
class DenseWhitened(WhitenedPrecision):
    """L L^T with a lower triangular L."""

    root: Array
    like: Params

    def solve(self, v: Params) -> Params:
        """By two triangular solves."""
        flat, unravel = ravel_pytree(widen_tree(v))
        return unravel(cho_solve((self.root, True), flat))

    def colour(self, noise: Params) -> Params:
        """L^-T times ``noise``."""
        flat, unravel = ravel_pytree(widen_tree(noise))
        return unravel(solve_triangular(self.root, flat, trans=1, lower=True))

    def variance(self) -> Params:
        """The sums of squares of the columns of L^-1."""
        _, unravel = ravel_pytree(widen_tree(self.like))
        identity = jnp.eye(len(self.root), dtype=self.root.dtype)
        return unravel(jnp.sum(solve_triangular(self.root, identity, lower=True) ** 2, axis=0))

    def logdet(self) -> Array:
        """From the diagonal of L."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.root)))
