"""Kronecker-factored curvature."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fvp.checks import check_inexact_tree, check_like, check_nonnegative, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.heads import Head
from fvp.heads.head import check_head
from fvp.layers.captured_batch import layer_rows
from fvp.layers.columns import check_not_negative
from fvp.layers.diagonal import squared_rows
from fvp.layers.factors import (
    WEIGHT_SHARING,
    kronecker_blocks,
    plans_of,
    with_corrected_eigenvalues,
)
from fvp.layers.kronecker import DAMPING_RULES, add_weight, weight_of
from fvp.mesh import auto_sharded, share_out
from fvp.model import close_model
from fvp.numerics import cast_like, widen
from fvp.tracing.coverage import Coverage, check_fallback, coverage_of
from fvp.tracing.layouts import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KFAC:
    """A block-diagonal curvature, each block a Kronecker product; built by :func:`fvp.kfac`.

    A pytree: it crosses ``jit``, can be averaged leaf by leaf, and ``vmap`` over vectors works.

    Attributes:
      blocks: the Kronecker factors, one block for each layer.
      diagonals: the exact diagonal of the parameters that only a fallback served, by leaf.
      coverage: how each parameter is treated; prints as a table.
    """

    blocks: tuple[Any, ...]
    diagonals: dict[int, Array]
    template: Any = dataclasses.field(metadata={"static": True})
    coverage: Coverage = dataclasses.field(metadata={"static": True})

    def mv(self, v: Any) -> Any:
        """The factored curvature times ``v``, a tree like the parameters."""
        return _multiply(self, check_like(v, self._like(), "v", "params"))

    def __matmul__(self, v: Any) -> Any:
        return self.mv(v)

    def solve(self, v: Any, damping: ArrayLike, *, rule: str = "exact") -> Any:
        """The damped inverse times ``v``; see :meth:`inverse`, which is better for many vectors."""
        return self.inverse(damping, rule=rule).mv(v)

    def inverse(
        self, damping: ArrayLike, *, rule: str = "exact", mesh: Mesh | None = None
    ) -> KFACInverse:
        """(K + damping I)^-1 as an operator, factorised once; pass it to ``fvp.cg`` as ``M=``.

        Args:
          damping: multiple of the identity; a number or scalar array. The number 0 raises where
            the curvature is singular.
          rule: how damping enters a block left x right.
            "exact": (left x right + damping I)^-1, by eigendecompositions of the factors;
            "pi": (left + pi sqrt(damping) I)^-1 x (right + sqrt(damping) / pi I)^-1, with
            pi^2 = mean eigenvalue of left / mean eigenvalue of right (Martens and Grosse 2015,
            section 6.3), by Cholesky; "factored": the same with pi = 1.
            Eigenvalue-corrected factors are always damped exactly.
          mesh: a device mesh: each of its devices inverts its share of the blocks and sends it to
            the others. Without one every device inverts all.
        """
        if rule not in DAMPING_RULES:
            raise ValueError(f"rule: expected one of {DAMPING_RULES}, got {rule!r}.")
        check_nonnegative(damping, "damping")
        if isinstance(damping, (int, float)) and damping == 0 and self._is_singular():
            raise ValueError(
                "damping: the factored curvature is singular and has no inverse at 0; pass a"
                " positive number."
            )
        return _invert(self, jnp.asarray(damping), rule, mesh)

    def trace(self) -> Array:
        """The trace."""
        total = sum(jnp.sum(diagonal) for diagonal in self.diagonals.values())
        return sum((block.trace() for block in self.blocks), jnp.asarray(total))

    def logdet(self, damping: ArrayLike = 0.0) -> Array:
        """The log-determinant of K + damping I; -inf where K is singular and damping zero."""
        values = [block.eigenvalues() for block in self.blocks] + list(self.diagonals.values())
        rest = sum(map(math.prod, self._shapes())) - sum(value.size for value in values)
        log = lambda x: jnp.sum(jnp.log(x + jnp.asarray(damping, x.dtype)))
        total = sum(map(log, values), jnp.zeros(()))
        return total + rest * jnp.log(jnp.asarray(damping, total.dtype)) if rest else total

    def dense(self) -> Array:
        """The (P, P) matrix in ``ravel_pytree`` order; memory P^2, for small P."""
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._like())
        flat, unravel = ravel_pytree(zero)
        column = lambda e: ravel_pytree(self.mv(unravel(e)))[0]
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))

    def _is_singular(self) -> bool:
        """Whether it is, to rounding; False where the numbers are not known yet."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            return False
        values = [block.eigenvalues().ravel() for block in self.blocks]
        values += [diagonal.ravel() for diagonal in self.diagonals.values()]
        if sum(value.size for value in values) < sum(map(math.prod, self._shapes())):
            return True  # some entries have no curvature
        smallest = [bool(jnp.min(x) <= jnp.finfo(x.dtype).eps * jnp.max(x)) for x in values]
        return any(smallest)

    def _like(self) -> Any:
        return jax.tree.unflatten(*self.template)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [shape.shape for shape in self.template[1]]

    def __repr__(self) -> str:
        return f"KFAC({len(self.blocks)} blocks, {len(self.diagonals)} diagonals)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KFACInverse:
    """(K + damping I)^-1: multiplies trees like the parameters; a pytree."""

    factors: tuple[Any, ...]
    diagonals: dict[int, Array]  # inverted
    damping: Array
    layouts: tuple[tuple[Layout, ...], ...] = dataclasses.field(metadata={"static": True})
    template: Any = dataclasses.field(metadata={"static": True})

    def mv(self, v: Any) -> Any:
        """The damped inverse times ``v``."""
        return _solve(self, check_like(v, jax.tree.unflatten(*self.template), "v", "params"))

    def __matmul__(self, v: Any) -> Any:
        return self.mv(v)

    def __call__(self, v: Any) -> Any:
        return self.mv(v)


@compiled_when_eager
def _multiply(operator: KFAC, v: Any) -> Any:
    return auto_sharded(_product, operator, v, like=v)


def _product(operator: KFAC, v: Any) -> Any:
    leaves = [widen(leaf) for leaf in jax.tree.leaves(v)]
    out = [jnp.zeros_like(leaf) for leaf in leaves]
    for block in operator.blocks:
        add_weight(block.layouts, out, block.multiply(weight_of(block.layouts, leaves)))
    for leaf, diagonal in operator.diagonals.items():
        out[leaf] = diagonal * leaves[leaf]
    return cast_like(jax.tree.unflatten(jax.tree.structure(v), out), v)


@compiled_when_eager
def _invert(operator: KFAC, damping: Array, rule: str, mesh: Mesh | None) -> KFACInverse:
    if mesh is None:
        factors = tuple(block.inverse(damping, rule) for block in operator.blocks)
    else:
        costs = [block.inversion_cost for block in operator.blocks]
        items = [(block, damping) for block in operator.blocks]
        factors = share_out(lambda item: item[0].inverse(item[1], rule), items, costs, mesh)
    return KFACInverse(
        factors,
        {leaf: 1 / (d + damping.astype(d.dtype)) for leaf, d in operator.diagonals.items()},
        damping,
        tuple(block.layouts for block in operator.blocks),
        operator.template,
    )


@compiled_when_eager
def _solve(inverse: KFACInverse, v: Any) -> Any:
    return auto_sharded(_solution, inverse, v, like=v)


def _solution(inverse: KFACInverse, v: Any) -> Any:
    leaves = [widen(leaf) for leaf in jax.tree.leaves(v)]
    out = [jnp.zeros_like(leaf) for leaf in leaves]
    for layouts, factor in zip(inverse.layouts, inverse.factors, strict=True):
        add_weight(layouts, out, factor.multiply(weight_of(layouts, leaves)))
    for leaf, diagonal in inverse.diagonals.items():
        out[leaf] = diagonal * leaves[leaf]
    for leaf, x in enumerate(leaves):
        used = [layout for block in inverse.layouts for layout in block if layout.view.leaf == leaf]
        covered = sum(math.prod(layout.shape) for layout in used)
        if leaf not in inverse.diagonals and covered < x.size:
            # Entries that the model does not read have no curvature.
            ones = [layout.leaf(jnp.ones(layout.shape, x.dtype)) for layout in used]
            rest = x / inverse.damping.astype(x.dtype)
            out[leaf] = jnp.where(sum(ones, jnp.zeros_like(x)) > 0, out[leaf], rest)
    return cast_like(jax.tree.unflatten(jax.tree.structure(v), out), v)


def kfac(
    model_fn: Callable[[Any, Any], Array],
    head: Head,
    params: Any,
    batch: Any,
    *,
    targets: Any = None,
    weights: ArrayLike | None = None,
    key: Array | None = None,
    num_samples: int = 1,
    weight_sharing: str = "expand",
    eigenvalue_corrected: bool = False,
    batch_axes: Any = 0,
    fallback: str | None = None,
) -> KFAC:
    r"""Kronecker-factored Fisher: for each layer, E[x x^T] x E[d d^T].

    x are the inputs of a layer (with a one, where it has a bias), d the cotangents of its outputs
    for the columns of S, S S^T = F_R. The layers are found by tracing ``model_fn``: dense layers in
    any layout, convolutions, lookups, biases, scales. Equal to the Fisher's diagonal block for one
    example without weight sharing, and for deep linear networks with a Gaussian head. Scales and
    biases that belong to no layer have their exact block; one of several axes that is used as it is
    has an exact block for each row of its last. The inputs of an embedding have a diagonal factor.

    Args:
      model_fn: pure function ``model_fn(params, batch) -> z``.
      head: output distribution, such as ``fvp.Softmax()``.
      params: pytree of floating-point arrays.
      batch: pytree that ``model_fn`` reads.
      targets: the data's labels, for the factors of the empirical Fisher.
      weights: one weight of 0 or more per example, shape = batch axes of z or broadcastable to it.
      key: a ``jax.random`` key, for factors from labels drawn from the model; None is exact.
      num_samples: labels drawn for each example with a ``key``.
      weight_sharing: where a weight is used R times in an example, "expand" treats its uses as
        examples, "reduce" averages their inputs and adds up their cotangents.
      eigenvalue_corrected: EK-FAC: replaces the eigenvalues of the product by the second moments of
        the per-example gradients in its eigenbasis, which is nearest to the Fisher's block there.
      batch_axes: where the example axis of each leaf of ``batch`` is.
      fallback: "per_example" gives parameters without a layer rule their exact diagonal, and serves
        models that mix examples, at one backward pass for each row and column.

    Returns:
      A :class:`KFAC`: ``K @ v``, ``K.solve(v, damping)``, ``K.inverse(damping)`` for ``M=`` of
      :func:`fvp.cg`, ``K.trace()``, ``K.logdet()``, ``K.dense()``, ``K.coverage``.

    Raises:
      ValueError: naming parameter and primitive where there is no layer rule and no fallback.

    Example:
      >>> import jax.numpy as jnp, fvp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> K = fvp.kfac(lambda w, x: x @ w, fvp.Gaussian(), jnp.zeros((2, 1)), x)
      >>> print((K @ jnp.ones((2, 1))).round().astype(int))  # a linear model: exact
      [[12]
       [17]]
      >>> print(K.coverage)
      parameter  shape   treatment
      params     (2, 1)  dense

    Reference:
      J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015; R. Grosse, J. Martens, 2016 (convolutions); R. Eschenhagen et al., 2023
      (expand and reduce); T. George et al., 2018 (eigenvalue correction).
    """
    check_positive_int(num_samples, "num_samples")
    check_fallback(fallback)
    check_not_negative(weights)
    if weight_sharing not in WEIGHT_SHARING:
        expected = " or ".join(map(repr, WEIGHT_SHARING))
        raise ValueError(f"weight_sharing: expected {expected}, got {weight_sharing!r}.")
    if targets is not None and key is not None:
        raise ValueError("targets, key: kfac takes one of the two, got both.")
    check_head(head)
    params = check_inexact_tree(params, "params")
    model_fn, batch = close_model(model_fn, batch)
    axes, structure = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
    static = ((structure, tuple(axes)), num_samples, weight_sharing, eigenvalue_corrected, fallback)
    return _build(model_fn, static, head, params, batch, targets, weights, key)


@compiled_when_eager
def _build(model_fn: Any, static: Any, *data: Any) -> KFAC:
    return auto_sharded(functools.partial(_factored, model_fn, static), *data)


def _factored(
    model_fn: Any,
    static: Any,
    head: Head,
    params: Any,
    batch: Any,
    targets: Any,
    weights: Any,
    key: Any,
) -> KFAC:
    axes, num_samples, sharing, eigenvalue_corrected, fallback = static
    keys = None if key is None else jax.random.split(key, num_samples)
    options = {"targets": targets, "keys": keys}
    batch_axes = jax.tree.unflatten(*axes)
    captured = layer_rows(model_fn, head, params, batch, weights, batch_axes, fallback, **options)
    plans, unserved = plans_of(captured, fallback)
    blocks = kronecker_blocks(captured, plans, sharing == "reduce")
    if eigenvalue_corrected:
        blocks = with_corrected_eigenvalues(captured, plans, blocks)
    rest = sorted(unserved)
    diagonals = squared_rows(model_fn, head, params, batch, weights, captured, rest, **options)
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return KFAC(
        tuple(blocks), diagonals, (structure, shapes), coverage_of(captured.layers, unserved)
    )
