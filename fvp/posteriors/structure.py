"""In which form the curvature of a posterior is held, and what a posterior asks of it.

With the prior precision D, a number for each parameter leaf, and the curvature H of the summed
loss, the precision of the posterior is

    H + D = D^(1/2) (I + D^(-1/2) H D^(-1/2)) D^(1/2),

and only the matrix in the middle, the whitened precision, depends on the form of H. Its
eigenvalues are 1 or more.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fvp.curvature import CurvatureOperator, FisherCurvature, Problem
from fvp.curvature.gauss_newton import gauss_newton_of
from fvp.curvature.operator import build_operator
from fvp.numerics import widen
from fvp.records import Record
from fvp.typing import Params, PyTree


class Options(NamedTuple):
    """What single structures read: see `fvp.laplace`."""

    rank: int
    key: Array
    fallback: str | None
    last_layer: tuple[int, ...] | None  # numbers of leaves


class Scales(NamedTuple):
    """The entries of D^(-1/2).

    Attributes:
      tree: like the random parameters, a scalar for each leaf.
      like: the random parameters.
      equal: whether all are one number.
    """

    tree: PyTree
    like: Params
    equal: bool

    def __call__(self, v: Params) -> Params:
        """D^(-1/2) v, in float32 or wider."""
        return jax.tree.map(lambda s, x: s * widen(x), self.tree, v)

    def vector(self) -> Array:
        """The diagonal of D^(-1/2), in the order of ``ravel_pytree``."""
        return ravel_pytree(self(jax.tree.map(jnp.ones_like, self.like)))[0]


class WhitenedPrecision(abc.ABC):
    """I + D^(-1/2) H D^(-1/2), factorised; lives inside one trace."""

    @abc.abstractmethod
    def solve(self, v: Params) -> Params:
        """Its inverse times ``v``."""

    @abc.abstractmethod
    def colour(self, noise: Params) -> Params:
        """R times ``noise``, for an R with R R^T its inverse: noise of that covariance."""

    @abc.abstractmethod
    def variance(self) -> Params:
        """The diagonal of its inverse."""

    @abc.abstractmethod
    def logdet(self) -> Array:
        """Its log-determinant."""


class Structure(Record, abc.ABC):
    """The curvature H of the summed loss, over all parameters or some; a pytree."""

    @classmethod
    @abc.abstractmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """That of the Fisher of ``problem``."""

    @abc.abstractmethod
    def whitened(self, scales: Scales) -> WhitenedPrecision:
        """The whitened precision, factorised."""

    def random(self, params: Params) -> Any:
        """The part of a tree like the parameters that H is over: all of it."""
        return params

    def fill(self, params: Params, part: Any) -> Params:
        """``params`` with its random part replaced."""
        del params
        return part


def summed_fisher(problem: Problem) -> tuple[CurvatureOperator, Array]:
    """The mean Fisher, and the sum of the weights that it is the mean over."""
    operator = build_operator(gauss_newton_of(FisherCurvature), problem, None)
    return operator, total_of(operator.total)


def total_of(total: Array) -> Array:
    """The sum of the weights, from that which means are divided by: infinite where it is zero."""
    return jnp.where(jnp.isinf(total), 0, total)
