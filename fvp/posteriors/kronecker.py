"""Kronecker factors, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from fvp.curvature import FisherCurvature, Problem
from fvp.layers import KFAC, KFACInverse
from fvp.layers.kfac import kfac_of
from fvp.layers.kronecker import Bases, EigenInverse, KroneckerBlock, rotated_back
from fvp.numerics import widen_tree
from fvp.posteriors.structure import Options, Scales, Structure, WhitenedPrecision, total_of
from fvp.typing import Params


@dataclasses.dataclass(frozen=True)
class KroneckerStructure(Structure):
    """H = total x K-FAC."""

    eigenvalue_corrected: ClassVar[bool] = False

    factors: KFAC
    total: Array

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """From a capture of the layers, see `fvp.kfac`."""
        fallback, corrected = options.fallback, cls.eigenvalue_corrected
        kind = FisherCurvature
        factors = kfac_of(problem, kind, eigenvalue_corrected=corrected, fallback=fallback)
        z = jax.eval_shape(problem.outputs, problem.params)
        return cls(factors, total_of(problem.total_weight(z)))

    def whitened(self, scales: Scales) -> WhitenedPrecision:
        """Factorised by the eigenvalues of the factors."""
        leaves = jax.tree.leaves(scales.tree)
        eigen = [_eigen(block, leaves, self.total, scales.equal) for block in self.factors.blocks]
        whiten = lambda leaf, d: self.total * leaves[leaf] ** 2 * d
        diagonals = {leaf: whiten(leaf, d) for leaf, d in self.factors.diagonals.items()}
        return KroneckerWhitened(self.factors, tuple(eigen), diagonals, scales.like)


@dataclasses.dataclass(frozen=True)
class CorrectedKroneckerStructure(KroneckerStructure):
    """H = total x EK-FAC, with the second moments of gradients for eigenvalues."""

    eigenvalue_corrected: ClassVar[bool] = True


def _eigen(
    block: KroneckerBlock, scales: list[Array], total: Array, equal: bool
) -> tuple[Array, Bases]:
    """Eigenvalues and bases of a block of D^(-1/2) H D^(-1/2)."""
    sides = [scales[layout.view.leaf] for layout in block.layouts]
    if equal or len(sides) == 1:
        return total * sides[0] ** 2 * block.eigenvalues(), block.eigenbases()
    if block.corrected is not None:
        raise ValueError(
            'prior_precision: the eigenbases of structure="ekfac" are those of layers with their'
            " biases, and a precision for each leaf would turn them; pass one number, or"
            ' structure="kfac".'
        )
    # The prior scales inputs: those of the weight, and the one of the bias.
    inputs = [jnp.full(layout.shape[1], s) for layout, s in zip(block.layouts, sides, strict=True)]
    inputs = jnp.concatenate(inputs)
    left = block.left * (inputs**2 if block.left.ndim == 2 else inputs[:, None] * inputs)
    block = dataclasses.replace(block, left=left)
    return total * block.eigenvalues(), block.eigenbases()


@dataclasses.dataclass(frozen=True)
class KroneckerWhitened(WhitenedPrecision):
    """A function of a block is that of its eigenvalues, in its eigenbases."""

    factors: KFAC
    eigen: tuple[tuple[Array, Bases], ...]
    diagonals: dict[int, Array]
    like: Params

    def solve(self, v: Params) -> Params:
        """The inverse."""
        return self._applied(lambda s: 1 / (1 + s), EigenInverse, v)

    def colour(self, noise: Params) -> Params:
        """The symmetric root of the inverse."""
        return self._applied(lambda s: jax.lax.rsqrt(1 + s), EigenInverse, noise)

    def variance(self) -> Params:
        """The diagonal of the inverse, that of each block from the squares of its bases."""
        ones = jax.tree.map(jnp.ones_like, widen_tree(self.like))
        return self._applied(lambda s: 1 / (1 + s), EigenDiagonal, ones)

    def logdet(self) -> Array:
        """The sum over all eigenvalues."""
        values = [values for values, _ in self.eigen] + list(self.diagonals.values())
        return jnp.asarray(sum(jnp.sum(jnp.log1p(value)) for value in values))

    def _applied(
        self, function: Callable[[Array], Array], kind: type[EigenInverse], v: Params
    ) -> Params:
        blocks = tuple(kind(*bases, function(x)) for x, bases in self.eigen)
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        leaves, structure = jax.tree.flatten(jax.tree.map(shapes, widen_tree(v)))
        return KFACInverse(
            blocks,
            {leaf: function(value) for leaf, value in self.diagonals.items()},
            jnp.ones(()),  # of what the model does not read
            tuple(block.layouts for block in self.factors.blocks),
            (structure, tuple(leaves)),
        ).mv(v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenDiagonal(EigenInverse):
    """The diagonal of the matrix that `EigenInverse` multiplies by."""

    def multiply(self, weight: Array) -> Array:
        """The diagonal times W."""
        left = None if self.left is None else self.left**2
        return rotated_back(left, self.right**2, self.inverse) * weight
