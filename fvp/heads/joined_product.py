"""A product of heads over one array: what the library computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from fvp.heads.head import Head
from fvp.heads.output_layout import OutputLayout
from fvp.heads.root import Root
from fvp.typing import ArrayOrShape

if TYPE_CHECKING:
    from fvp.heads.product import Product


@dataclasses.dataclass(frozen=True)
class JoinedProduct(Head):
    """`fvp.Product` of ``z`` = (batch axes, D), with targets by name."""

    product: Product
    layout: OutputLayout = dataclasses.field(metadata={"static": True})

    def _check_event(self, z: ArrayOrShape, name: str) -> None:
        if z.shape[-1] != self.layout.size:
            raise ValueError(
                f"{name}: expected {self.layout.size} entries on the last axis, those of the"
                f" outputs {list(self.layout.names)}, got shape {z.shape}."
            )

    def check_targets(self, z: ArrayOrShape, y: Any) -> Any:
        """Raises unless there are targets for each head; returns them as arrays."""
        self.check_outputs(z)
        return self.product.check_targets(jax.eval_shape(self.layout.split, z), y)

    def mean(self, z: Array) -> Any:
        """E[y given z] of each output, by name."""
        parts: Any = self.layout.split(z)
        return self.product.mean(parts)

    def sampled_score(self, key: Array, z: Array) -> Array:
        """That of the product, in one array."""
        return self._join(self.product.sampled_score(key, self.layout.split(z)))

    def _nll(self, z: Array, y: Any) -> Array:
        return self.product._nll(self.layout.split(z), y)

    def _relative_nll(self, z: Array, y: Any) -> Array:
        return self.product._relative_nll(self.layout.split(z), y)

    def _mean(self, z: Array) -> Any:
        return self.product._mean(self.layout.split(z))

    def _sample(self, key: Array, z: Array, dtype: DTypeLike) -> Any:
        return self.product._sample(key, self.layout.split(z), dtype)

    def _score(self, z: Array, y: Any) -> Array:
        return self._join(self.product._score(self.layout.split(z), y))

    def _fisher(self, z: Array, u: Array) -> Array:
        return self._join(self.product._fisher(self.layout.split(z), self.layout.split(u)))

    def _hessian(self, z: Array, y: Any, u: Array) -> Array:
        split = self.layout.split
        return self._join(self.product._hessian(split(z), y, split(u)))

    def _sqrt_fisher(self, z: Array, w: Array) -> Array:
        return self._join(self.product._sqrt_fisher(self.layout.split(z), self.layout.split(w)))

    def _sqrt_fisher_transpose(self, z: Array, u: Array) -> Array:
        return self._join(
            self.product._sqrt_fisher_transpose(self.layout.split(z), self.layout.split(u))
        )

    def _kl(self, z: Array, z_new: Array) -> Array:
        return self.product._kl(self.layout.split(z), self.layout.split(z_new))

    def _fisher_root(self, z: Array) -> Root:
        parts, heads = self.layout.split(z), self.product.heads
        return self._side_by_side([heads[n]._fisher_root(parts[n]) for n in heads])

    def _hessian_root(self, z: Array, y: Any) -> Root | None:
        parts, heads = self.layout.split(z), self.product.heads
        roots = [heads[n]._hessian_root(parts[n], y[n]) for n in heads]
        known = [root for root in roots if root is not None]
        return self._side_by_side(known) if len(known) == len(roots) else None

    def _join(self, parts: dict[str, Array]) -> Array:
        """In the dtype that the parts were computed in."""
        dtypes = tuple(parts[name].dtype for name in self.layout.names)
        return dataclasses.replace(self.layout, dtypes=dtypes).join(parts)

    def _side_by_side(self, roots: Sequence[Root]) -> Root:
        """The columns of all parts, times the roots of their weights, one part after the other."""
        names = self.layout.names
        starts = [sum(root.size for root in roots[:i]) for i in range(len(roots))]
        weigh = lambda columns: self.product._scaled(columns, 0.5)

        def column(k: ArrayLike) -> Array:
            columns = {}
            for name, root, start in zip(names, roots, starts, strict=True):
                inside = (k >= jnp.asarray(start)) & (k < jnp.asarray(start + root.size))
                there = root.column(jnp.clip(k - jnp.asarray(start), 0, root.size - 1))
                columns[name] = jnp.where(inside, there, 0)
            return self._join(weigh(columns))

        scores = {n: root.score for n, root in zip(names, roots, strict=True) if root.score}

        def score(targets: Any) -> Array:
            weighed = weigh({name: scores[name](targets[name]) for name in names})
            return jnp.concatenate([weighed[name] for name in names], axis=-1)

        known = len(scores) == len(roots)
        return Root(sum(root.size for root in roots), column, score if known else None)
