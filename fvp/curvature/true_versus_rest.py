"""The part of the softmax curvature between the true class and all others."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.curvature.output_curvature import OutputCurvature
from fvp.curvature.problem import Problem
from fvp.heads import Root, Softmax
from fvp.numerics import widen


@dataclasses.dataclass(frozen=True)
class TrueVersusRest(OutputCurvature):
    """p_y (1 - p_y) d d^T with d = e_y - q: the Hessian of `Softmax` as if the rest were one class.

    y is the label, and q are the probabilities of the other classes among themselves. The whole
    Hessian is this and (1 - p_y) (diag(q) - q q^T), which is positive semi-definite: what is left
    out is the uncertainty among wrong classes, nothing for two classes, and little where one rival
    dominates. Gradients lie in the span of d, and an exact solve in the space of examples x outputs
    (`fvp.solve_dual`) has one row for each example instead of C - 1.

    Steps are longer than those of the whole, where damping allows it. Labels have to be integers.

    Raises:
      TypeError: for another head than `Softmax`, or targets that are rows.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> w, x, y = jnp.zeros((2, 3)), jnp.eye(2), jnp.array([0, 2])
      >>> model = lambda w, x: x @ w
      >>> G = fvp.gauss_newton(fvp.TrueVersusRest, model, fvp.Softmax(), w, x, targets=y)
      >>> H = fvp.hessian(model, fvp.Softmax(), w, x, y)
      >>> print((jnp.trace(G.dense()) / jnp.trace(H.dense())).round(3))
      0.5
      >>> tx = fvp.natural_gradient(
      ...     1.0, model, fvp.Softmax(), curvature=fvp.TrueVersusRest, solver="dual"
      ... )

    Reference:
      M. Korbit, M. Zanon, Fast Gauss-Newton for multiclass cross-entropy, arXiv 2605.06081, 2026.
    """

    reads_targets: ClassVar[bool | None] = True

    direction: Array  # d, like z
    margin: Array  # log p_y - log (1 - p_y), over the batch axes and one event axis of length 1

    @classmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """At the targets of the problem."""
        head = problem.head
        if not isinstance(head, Softmax):
            raise TypeError(f"head: TrueVersusRest expects fvp.Softmax(), got {head!r}.")
        z, y = widen(z), head.check_targets(z, problem.targets)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(
                f"targets: TrueVersusRest expects integer labels, got rows of {y.dtype}; of"
                " probabilities none is the true class."
            )
        true = y[..., None] == jnp.arange(z.shape[-1])
        rest = jnp.where(true, -jnp.inf, z)
        others = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        chosen = jnp.sum(jnp.where(true, z, 0), axis=-1, keepdims=True)
        is_class = jnp.any(true, axis=-1, keepdims=True)
        margin = jnp.where(is_class, chosen - others, jnp.nan)
        # Where all others are impossible, the class is certain.
        q = jnp.where(others == -jnp.inf, 0, jnp.exp(rest - others))
        return cls(jnp.where(true, 1, -q), margin)

    def __call__(self, u: Array) -> Array:
        column = self._column()
        return column * jnp.sum(column * u, axis=-1, keepdims=True)

    def root(self) -> Root:
        """One column."""

        def score(targets: Any) -> Array:
            # The gradient of the nll is -(1 - p_y) d, at no other label than y.
            same = (targets[..., None] == jnp.arange(self.direction.shape[-1])) & self._is_true
            known = self._scale() > 0
            w = jnp.where(known, -jnp.exp(-0.5 * jnp.where(known, self.margin, 0)), 0)
            return jnp.where(jnp.any(same, axis=-1, keepdims=True), w, jnp.nan)

        def column(k: ArrayLike) -> Array:
            del k
            return self._column()

        return Root(1, column, score)

    @property
    def _is_true(self) -> Array:
        """Which class is the label."""
        return self.direction == 1

    def _column(self) -> Array:
        return self._scale() * self.direction

    def _scale(self) -> Array:
        """sqrt(p_y (1 - p_y)), with its digits at both ends."""
        return jnp.exp(0.5 * (jax.nn.log_sigmoid(self.margin) + jax.nn.log_sigmoid(-self.margin)))
