"""Values by name, as a field of a head: a dict that hashes, in the order of its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax


@jax.tree_util.register_pytree_with_keys_class
class Named(dict[str, Any]):
    """A dict that hashes where its values do, and is a pytree like any other; not to be changed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__((name, values[name]) for name in sorted(values))

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """As that of a dict, sorted by name."""
        return [(jax.tree_util.DictKey(name), value) for name, value in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Any) -> Self:
        """From the names and the values."""
        return cls(dict(zip(names, values, strict=True)))
