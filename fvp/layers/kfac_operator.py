"""A Kronecker-factored curvature as an operator, and its damped inverse."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fvp.checks import check_like, check_nonnegative
from fvp.compilation import compiled_when_eager
from fvp.layers.kronecker import (
    EigenInverse,
    FactorInverse,
    KroneckerBlock,
    add_weight,
    check_damping_rule,
    weight_of,
)
from fvp.mesh import auto_sharded, share_out
from fvp.numerics import cast_like, widen, zeros_of
from fvp.tracing.coverage import Coverage
from fvp.tracing.layouts import Layout
from fvp.typing import Params, PyTreeDef

#: Structure of the parameters, and the shapes and dtypes of their leaves; static.
Template: TypeAlias = tuple[PyTreeDef, tuple[jax.ShapeDtypeStruct, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KFAC:
    """A block-diagonal curvature, each block a Kronecker product; built by `fvp.kfac`.

    A pytree: it crosses ``jit``, can be averaged leaf by leaf, and ``vmap`` over vectors works.

    Attributes:
      blocks: the Kronecker factors, one block for each layer.
      diagonals: the exact diagonal of the parameters that only the fallback handles, by leaf.
      coverage: how each parameter is treated; prints as a table.
    """

    blocks: tuple[KroneckerBlock, ...]
    diagonals: dict[int, Array]
    template: Template = dataclasses.field(metadata={"static": True})
    coverage: Coverage = dataclasses.field(metadata={"static": True})

    @property
    def like(self) -> Params:
        """Shapes and dtypes of the parameters, as a tree of ``jax.ShapeDtypeStruct``."""
        return jax.tree.unflatten(*self.template)

    def mv(self, v: Params) -> Params:
        """The factored curvature times ``v``, a tree like the parameters."""
        return _multiply(self, check_like(v, self.like, "v", "params"))

    def __matmul__(self, v: Params) -> Params:
        return self.mv(v)

    def solve(self, v: Params, damping: ArrayLike, *, rule: str = "exact") -> Params:
        """The damped inverse times ``v``; see `inverse`, which is better for many vectors."""
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
        check_damping_rule(rule)
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
        flat, unravel = ravel_pytree(zeros_of(self.like))
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
        # docs/decisions/layers.md
        smallest = [bool(jnp.min(x) <= jnp.finfo(x.dtype).eps * jnp.max(x)) for x in values]
        return any(smallest)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [shape.shape for shape in self.template[1]]

    def __repr__(self) -> str:
        return f"KFAC({len(self.blocks)} blocks, {len(self.diagonals)} diagonals)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KFACInverse:
    """(K + damping I)^-1: multiplies trees like the parameters; a pytree."""

    factors: tuple[EigenInverse | FactorInverse, ...]
    diagonals: dict[int, Array]  # inverted
    damping: Array
    layouts: tuple[tuple[Layout, ...], ...] = dataclasses.field(metadata={"static": True})
    template: Template = dataclasses.field(metadata={"static": True})

    @property
    def like(self) -> Params:
        """Shapes and dtypes of the parameters, as a tree of ``jax.ShapeDtypeStruct``."""
        return jax.tree.unflatten(*self.template)

    def mv(self, v: Params) -> Params:
        """The damped inverse times ``v``."""
        return _solve(self, check_like(v, self.like, "v", "params"))

    def __matmul__(self, v: Params) -> Params:
        return self.mv(v)

    def __call__(self, v: Params) -> Params:
        return self.mv(v)


@compiled_when_eager
def _multiply(operator: KFAC, v: Params) -> Params:
    return auto_sharded(_product, operator, v, like=v)


def _product(operator: KFAC, v: Params) -> Params:
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
def _solve(inverse: KFACInverse, v: Params) -> Params:
    return auto_sharded(_solution, inverse, v, like=v)


def _solution(inverse: KFACInverse, v: Params) -> Params:
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
