"""The inverse of an information matrix, and what to say where it has none."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fvp.checks import counted
from fvp.numerics import widen
from fvp.statistics.parameter_names import entry_names, listed
from fvp.typing import Params


class InvertedInformation(NamedTuple):
    """The inverse of a symmetric (P, P) information, through its correlation matrix.

    With D = diag |information| the eigenvalues are those of D^-1/2 information D^-1/2, which has
    ones on its diagonal: they do not change with the units of the parameters.

    Attributes:
      inverse: NaN where an eigenvalue is at most the floor.
      values: (P,) eigenvalues in ascending order.
      vectors: (P, P) eigenvectors, in columns.
      floor: eigenvalues up to this are the rounding of zero.
    """

    inverse: Array
    values: Array
    vectors: Array
    floor: Array

    @classmethod
    def of(cls, information: Array, count: int) -> InvertedInformation:
        """From a sum over ``count`` examples.

        Each entry of the correlation matrix was rounded by about eps sqrt(count), the error of a
        sum of ``count`` terms (N. Higham, T. Mary, A new approach to probabilistic rounding error
        analysis, 2019); that moves its eigenvalues by up to eps sqrt(count) P.
        """
        information = widen(0.5 * (information + information.T))
        size = information.shape[0]
        diagonal = jnp.abs(jnp.diagonal(information))
        unit = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
        correlation = unit[:, None] * information * unit
        values, vectors = jnp.linalg.eigh(correlation)
        largest = jnp.max(jnp.abs(values), initial=0)
        floor = jnp.finfo(values.dtype).eps * np.sqrt(count) * size * largest
        usable = jnp.all(values > floor)
        scaled = unit[:, None] * vectors
        inverse = jnp.matmul(
            scaled / jnp.where(values > floor, values, 1),
            scaled.T,
            precision=jax.lax.Precision.HIGHEST,
        )
        return cls(jnp.where(usable, inverse, jnp.nan), values, vectors, floor)

    def check(self, params: Params, kind: str) -> None:
        """Raises where the information is singular; where it is traced its inverse is NaN."""
        if isinstance(self.values, Tracer):
            return
        values, floor = np.asarray(self.values), float(self.floor)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"params: the {kind} information is not finite there.")
        null = values <= floor
        if not null.any():
            return
        names = np.array(entry_names(params))
        # An entry that moves by a tenth of the largest is part of the direction.
        moves = np.abs(np.asarray(self.vectors)[:, null])
        involved = listed(names[(moves > 0.1 * moves.max(0)).any(1)].tolist())
        if np.any(values < -floor):
            raise ValueError(
                f"params: the {kind} information has"
                f" {counted(np.sum(values < -floor), 'negative eigenvalue')}, in directions of"
                f" {involved}: this is no minimum of the loss. Fit the model first, or take"
                ' kind="expected".'
            )
        raise ValueError(
            f"params: the {kind} information is singular, with"
            f" {counted(null.sum(), 'null direction')}, of {involved}: the data don't tell these"
            " parameters apart. Drop or fix some of them (smallest eigenvalue"
            f" {values[0]:.1e}, rounding {floor:.1e}, in {values.dtype}; float64 resolves more)."
        )
