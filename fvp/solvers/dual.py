"""Damped solves in the space of examples x outputs (Woodbury)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fvp.checks import check_like, check_nonnegative
from fvp.compilation import compiled_when_eager
from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.pieces import GaussNewtonPiece, apply_weights
from fvp.factorization import SemidefiniteFactor
from fvp.heads import Gaussian, Head, Sigmoid, Softmax
from fvp.layers.captured_batch import CapturedBatch
from fvp.layers.chunks import CHUNK
from fvp.layers.columns import (
    check_not_negative,
    exact_root_coefficients,
    has_root,
    metric_columns,
    multiple_of_fisher,
)
from fvp.layers.gram import gram_matrix
from fvp.mesh import row_axes
from fvp.numerics import cast_like, tree_axpy, tree_vdot, tree_where, widen, widen_tree
from fvp.tracing.capture import capture


def solve_dual(
    operator: CurvatureOperator, rhs: Any, damping: ArrayLike, *, targets: Any = None
) -> Any:
    r"""Solves (F + damping I) x = rhs exactly, through a matrix of examples x outputs.

    With F = A^T A, one row of A for each example and column of S, S S^T = F_R,

        x = (rhs - A^T (A A^T + damping I)^-1 A rhs) / damping,

    refined once. A A^T comes from products of the inputs and cotangents of each layer
    (:mod:`fvp.layers`), never from one backward pass per row; only parameters whose use has no
    layer rule take that. The cost is that of the (rows, rows) matrix and its Cholesky
    factorisation: choose it where rows = examples x outputs are fewer than the parameters, a few
    thousand at most.

    Args:
      operator: from :func:`fvp.fisher`, :func:`fvp.ggn`, :func:`fvp.empirical_fisher` or
        :func:`fvp.mc_fisher`, without ``chunk_size`` and ``axis_name``.
      rhs: pytree like the parameters.
      damping: positive number or scalar array; a vector of them solves for each, on a leading axis
        of the result, at little more than the cost of one.
      targets: the labels whose gradient ``rhs`` is. It then enters as A^T w, x = A^T (A A^T +
        damping I)^-1 w, which keeps its digits however small the damping; ``rhs`` may still hold
        more than that gradient.

    Returns:
      x, a pytree like ``rhs``.

    Raises:
      TypeError: for an operator that is not a sum of outer products, such as the Hessian.
      ValueError: for a chunked operator, a damping that is not positive, or examples sharded over
        Explicit mesh axes.

    Example:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[3.0, 4.0]])
      >>> F = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print(fvp.solve_dual(F, jnp.array([[3.0], [4.0]]), 25.0))  # rhs / (25 + 25)
      [[0.06]
       [0.08]]

    Reference:
      Y. Ren, D. Goldfarb, Efficient subsampled Gauss-Newton and natural gradient methods for
      training neural networks, 2019; A. Chen, M. Heyl, minSR, 2024.
    """
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(f"operator: expected one such as fvp.fisher(...), got {operator!r}.")
    if not isinstance(operator.piece, GaussNewtonPiece):
        kind = type(operator.piece).__name__
        if kind == "ChunkedPiece":
            raise ValueError("operator: solve_dual expects one built without chunk_size.")
        raise TypeError(f"operator: solve_dual expects a Fisher or GGN, got one of a {kind}.")
    if not has_root(operator.piece.metric):
        raise TypeError(_no_root(operator.piece.metric))
    if operator.axis_name is not None:
        raise ValueError("operator: solve_dual expects one built without axis_name.")
    if row_axes(operator.piece.output) is not None:
        raise ValueError(
            "operator: its examples are sharded over Explicit mesh axes, which solve_dual regroups;"
            " build and solve inside jax.sharding.auto_axes."
        )
    check_nonnegative(damping, "damping")
    if isinstance(damping, (int, float)) and damping == 0:
        raise ValueError("damping: solve_dual expects a positive number, got 0.")
    check_not_negative(operator.piece.weights)
    rhs = check_like(rhs, operator._like(), "rhs", "params", cast=False)
    return _solve(operator, rhs, jnp.asarray(damping), targets)


@compiled_when_eager
def _solve(operator: CurvatureOperator, rhs: Any, damping: Array, targets: Any) -> Any:
    rows = ExampleRows.of(operator)
    gram = rows.gram()
    at = lambda damping: DualSystem.of(rows, gram, damping).solve(rhs, targets)
    return jax.lax.map(at, damping) if damping.ndim else at(damping)


@dataclasses.dataclass(frozen=True)
class DualSystem:
    """F + damping I, factorised in the space of examples x outputs; lives inside one trace."""

    rows: ExampleRows
    factor: SemidefiniteFactor
    damping: Array

    @classmethod
    def of(cls, rows: ExampleRows, gram: Array, damping: Array) -> DualSystem:
        """From A and A A^T."""
        damping = damping.astype(gram.dtype)
        return cls(rows, SemidefiniteFactor.of(gram, damping), damping)

    def solve(self, rhs: Any, targets: Any = None) -> Any:
        """The x for ``rhs``, the gradient at ``targets`` and maybe more; see :func:`solve_dual`."""
        wide = widen_tree(rhs)
        w = None if targets is None else self.rows.whitened(targets)
        if w is None:
            x = self._solve_rest(wide)
            # One step of refinement takes back what cancels in the difference.
            operator = self.rows.operator
            product = widen_tree(operator.mv(cast_like(x, operator._like())))
            residual = tree_axpy(-1, product, tree_axpy(-self.damping, x, wide))
            return cast_like(tree_axpy(1, self._solve_rest(residual), x), rhs)
        rest = tree_axpy(-1, self.rows.transposed(w), wide)
        # What is left by rounding is not divided by the damping.
        level = 64 * jnp.finfo(self.damping.dtype).eps
        noise = tree_vdot(rest, rest) <= level**2 * tree_vdot(wide, wide)
        rest = tree_where(noise, jax.tree.map(jnp.zeros_like, rest), rest)
        return cast_like(tree_axpy(1, self._solve_rows(w), self._solve_rest(rest)), rhs)

    def solve_outputs(self, u: Array) -> Any:
        """(F + damping I)^-1 J^T H_L u for a change ``u`` of the outputs, without cancellation."""
        return self._solve_rows(self.rows.images(u))

    def _solve_rows(self, w: Array) -> Any:
        """A^T (A A^T + damping I)^-1 w."""
        inner = self.factor.solve(w.reshape(-1, 1)).reshape(w.shape)
        return self.rows.transposed(inner)

    def _solve_rest(self, b: Any) -> Any:
        correction = self._solve_rows(self.rows.times(b))
        difference = tree_axpy(-1, correction, b)
        return jax.tree.map(lambda x: x / self.damping.astype(x.dtype), difference)


@dataclasses.dataclass(frozen=True)
class ExampleRows:
    """A, F = A^T A: a row for each column of the metric and example; lives inside one trace."""

    operator: CurvatureOperator
    captured: CapturedBatch
    columns: Array  # (K, like z)

    @classmethod
    def of(cls, operator: CurvatureOperator) -> ExampleRows:
        """The rows of ``operator``."""
        piece, source = operator.piece, operator.source
        if not has_root(piece.metric):
            raise TypeError(_no_root(piece.metric))
        batch_axes: Any = 0
        if source.batch_axes is not None:
            batch_axes = jax.tree.unflatten(jax.tree.structure(source.batch), source.batch_axes)
        layers = capture(source.model_fn, piece.head, source.params, source.batch, batch_axes)
        make = lambda separate: metric_columns(piece, operator.total, separate)
        captured = CapturedBatch.of(layers, make)
        return cls(operator, captured, captured.columns.all())

    def times(self, v: Any) -> Array:
        """A v, of shape (K, E)."""
        v = cast_like(v, self.operator._like())
        return self.images(self.operator.piece.linearization.jvp(v))

    def images(self, u: Array) -> Array:
        """A v where J v = ``u``, of shape (K, E)."""
        u = widen(u)
        _, others = self._axes()
        dots = jnp.sum(self.columns * u, axis=tuple(1 + d for d in others))
        return dots.reshape(self.columns.shape[0], -1)

    def transposed(self, w: Array) -> Any:
        """A^T w, in float32 or wider."""
        output = self.operator.piece.output
        u = jnp.sum(self.columns * self._spread(w), axis=0).astype(output.dtype)
        return widen_tree(self.operator.piece.linearization.vjp(u))

    def gram(self) -> Array:
        """A A^T, (K E, K E)."""
        unmatched = self.captured.unmatched
        return gram_matrix(self.captured, self._plain_rows if unmatched else None)

    def whitened(self, targets: Any) -> Array | None:
        """The w with A^T w = the gradient of the loss at ``targets``, up to entries left at zero.

        None where the columns are not those of S, or the head's S has no known inverse.
        """
        piece = self.operator.piece
        if hasattr(piece.metric, "scores"):
            return None
        w = whitened_score(piece.head, piece.metric.z, targets)
        if w is None:
            return None
        w = exact_root_coefficients(piece.head, piece.metric.z, w)
        if (factor := multiple_of_fisher(piece.metric)) is not None:
            factor = factor.reshape(*factor.shape, *(1,) * piece.head.event_ndim)
            w = jnp.where(factor > 0, w / jnp.where(factor > 0, factor, 1), 0)
        shares = self.captured.columns.shares
        w = apply_weights(jnp.sqrt(shares), piece.head.event_ndim, w)
        # The coefficient of a column is the entry of w where the unit vector behind it was one.
        event = w.reshape(*shares.shape, -1)
        separate, size = self.captured.separate, event.shape[-1]
        order = [*separate, len(shares.shape), *self.captured.layers.examples]
        rest = [axis for axis in range(event.ndim) if axis not in order]  # of length one
        return event.transpose(*order, *rest).reshape(-1 if separate else size, self._examples())

    def _examples(self) -> int:
        return self.captured.shares.size

    def _axes(self) -> tuple[list[int], list[int]]:
        examples = list(self.captured.layers.examples)
        others = [d for d in range(self.operator.piece.output.ndim) if d not in examples]
        return examples, others

    def _spread(self, w: Array) -> Array:
        examples, _ = self._axes()
        shape = [size if d in examples else 1 for d, size in enumerate(self.columns.shape[1:])]
        return w.reshape(-1, *shape)

    def _plain_rows(self, columns: Array) -> Array:
        """(K, E, entries of the unmatched leaves), by one backward pass for each row."""
        piece, examples = self.operator.piece, self._examples()

        def row(index: Array) -> Array:
            unit = (jnp.arange(columns.shape[0] * examples) == index).astype(columns.dtype)
            w = unit.reshape(columns.shape[0], examples)
            u = jnp.sum(columns * self._spread(w), axis=0).astype(piece.output.dtype)
            leaves = jax.tree.leaves(piece.linearization.vjp(u))
            return jnp.concatenate([widen(leaves[i]).ravel() for i in self.captured.unmatched])

        count = columns.shape[0] * examples
        size = max(1, CHUNK // sum(s.size for s in jax.tree.leaves(self.operator._like())))
        rows = jax.lax.map(row, jnp.arange(count), batch_size=min(size, count))
        return rows.reshape(columns.shape[0], examples, -1)


def _no_root(metric: Any) -> str:
    head = getattr(metric, "head", None)
    kind = type(metric if head is None else head).__name__
    return (
        f"operator: the dual solve needs the square root of the curvature in z, which is not known"
        f" for the Hessian of {kind}: it is not its Fisher. Take fvp.fisher(...), or fvp.cg."
    )


def whitened_score(head: Head, z: Array, targets: Any) -> Array | None:
    """The w with S w = -score(z, targets), of the shape of z; zero where S has no digits left."""
    if isinstance(head, Gaussian):
        return head.sqrt_fisher_transpose(z, z - jnp.asarray(targets).astype(z.dtype))
    if isinstance(head, Softmax):
        variance = head.mean(z)
    elif isinstance(head, Sigmoid):
        variance = head.fisher(z, jnp.ones_like(z))
    else:
        return None
    usable = variance > jnp.finfo(z.dtype).eps  # below, w is so large that sums of it lose the rest
    root = jnp.sqrt(jnp.where(usable, variance, 1))
    return jnp.where(usable, -head.score(z, targets) / root, 0)
