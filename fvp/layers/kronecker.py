"""One block of a Kronecker-factored curvature, and its damped inverses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from fvp.factorization import eigh_semidefinite, inverse_semidefinite
from fvp.layers.products import einsum
from fvp.tracing.layouts import Layout

if TYPE_CHECKING:
    from jaxtyping import Float

#: Eigenvectors of left, None for the identity, and of right.
Bases: TypeAlias = tuple[Array | None, Array]

DAMPING_RULES = ("exact", "pi", "factored")


def check_damping_rule(rule: str) -> None:
    """Raises unless there is such a rule."""
    if rule not in DAMPING_RULES:
        raise ValueError(f"rule: expected one of {DAMPING_RULES}, got {rule!r}.")


def weight_of(layouts: tuple[Layout, ...], leaves: Sequence[Array]) -> Float[Array, "G I O"]:
    """The weight of a block out of the leaves of a tree, a bias as its last input."""
    parts = [layout.weight(leaves[layout.view.leaf]) for layout in layouts]
    groups, _, outputs = parts[0].shape
    parts[1:] = [part.reshape(groups, 1, outputs) for part in parts[1:]]
    return jnp.concatenate(parts, axis=1)


def add_weight(
    layouts: tuple[Layout, ...], leaves: list[Array], weight: Float[Array, "G I O"]
) -> None:
    """Adds the weight of a block to the leaves it came from."""
    inputs = layouts[0].shape[1]
    parts = [weight[:, :inputs], weight[:, inputs:]]
    for layout, part in zip(layouts, parts, strict=False):
        leaves[layout.view.leaf] += layout.leaf(part.reshape(layout.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerBlock:
    """left x right on a weight W (G, I, O): W -> left W right, group by group.

    Attributes:
      left: second moment of the inputs; (G, I) of a lookup, whose inputs are one-hot.
      right: second moment of the output cotangents.
      corrected: None, or for EK-FAC the second moment of the per-example gradients in the
        eigenbases of the factors, which ``bases`` then holds.
      layouts: of the weight, and of the bias that is its last input, if it has one.
    """

    left: Float[Array, "G I I"] | Float[Array, "G I"]
    right: Float[Array, "G O O"]
    corrected: Float[Array, "G I O"] | None
    bases: Bases | None
    layouts: tuple[Layout, ...] = dataclasses.field(metadata={"static": True})

    def multiply(self, weight: Float[Array, "G I O"]) -> Float[Array, "G I O"]:
        """Left W right."""
        if self.corrected is not None:
            return EigenInverse(*self.eigenbases(), self.corrected).multiply(weight)
        weight = einsum("gio,gop->gip", weight, self.right)
        return _left_multiply(self.left, weight)

    def eigenvalues(self) -> Float[Array, "G I O"]:
        """Products of the eigenvalues of the factors, or the corrected ones."""
        return self._eigen()[0]

    def trace(self) -> Array:
        """The trace of the block."""
        if self.corrected is not None:
            return jnp.sum(self.corrected)
        left = self.left if self.left.ndim == 2 else jnp.diagonal(self.left, axis1=1, axis2=2)
        right = jnp.diagonal(self.right, axis1=1, axis2=2)
        return jnp.sum(left.sum(1) * right.sum(1))

    @property
    def inversion_cost(self) -> float:
        """What inverting the block costs, up to a constant: the cubes of its factors' sizes."""
        left = 0 if self.left.ndim == 2 else self.left.shape[0] * self.left.shape[1] ** 3
        return left + self.right.shape[0] * self.right.shape[1] ** 3

    def inverse(self, damping: Array, rule: str) -> EigenInverse | FactorInverse:
        """The damped inverse as a pytree with ``multiply``."""
        if rule == "exact" or self.corrected is not None:
            values, (left, right) = self._eigen()
            return EigenInverse(left, right, 1 / (values + damping))
        root = jnp.sqrt(jnp.asarray(damping, self.right.dtype))
        split = self._split() if rule == "pi" else jnp.ones_like(self.right[:, 0, 0])
        if self.left.ndim == 2:
            left = 1 / (_finite(self.left) + (split * root)[:, None])
        else:
            left = inverse_semidefinite(self.left, split * root)
        return FactorInverse(left, inverse_semidefinite(self.right, root / split))

    def _split(self) -> Array:
        """Pi = sqrt(mean eigenvalue of left / mean eigenvalue of right), one per group."""
        left = self.left if self.left.ndim == 2 else jnp.diagonal(self.left, axis1=1, axis2=2)
        left, right = left.mean(1), jnp.diagonal(self.right, axis1=1, axis2=2).mean(1)
        usable = (left > 0) & (right > 0) & jnp.isfinite(left) & jnp.isfinite(right)
        ratio = jnp.where(usable, left, 1) / jnp.where(usable, right, 1)
        return jnp.sqrt(ratio)

    def eigenbases(self) -> Bases:
        """Eigenvectors of left (None for the identity) and of right."""
        return self._eigen()[1]

    def _eigen(self) -> tuple[Float[Array, "G I O"], Bases]:
        if self.corrected is not None and self.bases is not None:
            return self.corrected, self.bases
        right, right_basis = eigh_semidefinite(self.right)
        left_basis = None
        if self.left.ndim == 2:
            left = _finite(self.left)
        else:
            left, left_basis = eigh_semidefinite(self.left)
        return left[:, :, None] * right[:, None, :], (left_basis, right_basis)


def _finite(x: Array) -> Array:
    """What is not finite as zero: no factor hands it on to a solution."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _left_multiply(left: Array, weight: Array) -> Array:
    if left.ndim == 2:
        return left[:, :, None] * weight
    return einsum("gij,gjo->gio", left, weight)


def rotated(left: Array | None, right: Array, weight: Array) -> Array:
    """Q_left^T W Q_right; a left basis of None is the identity."""
    weight = weight if left is None else einsum("gji,gjo->gio", left, weight)
    return einsum("gio,gop->gip", weight, right)


def rotated_back(left: Array | None, right: Array, weight: Array) -> Array:
    """Q_left W Q_right^T."""
    weight = weight if left is None else einsum("gij,gjo->gio", left, weight)
    return einsum("gio,gpo->gip", weight, right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenInverse:
    """Q_left [ inverse * (Q_left^T W Q_right) ] Q_right^T."""

    left: Array | None
    right: Array
    inverse: Array

    def multiply(self, weight: Array) -> Array:
        """The inverse times W."""
        scaled = self.inverse * rotated(self.left, self.right, weight)
        return rotated_back(self.left, self.right, scaled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorInverse:
    """left W right, of the inverses of damped factors."""

    left: Array
    right: Array

    def multiply(self, weight: Array) -> Array:
        """The inverse times W."""
        return _left_multiply(self.left, einsum("gio,gop->gip", weight, self.right))
