"""Flax's serialization of states that hold records of the library's own."""

from __future__ import annotations

import sys
from typing import Any

import jax

from fvp.layers import KFAC, KFACInverse
from fvp.scalars import Scalars


def register_with_flax() -> None:
    """Teaches ``flax.serialization`` the records of a state, once Flax has been imported.

    A record is the list of its leaves; its structure comes from the target, as Flax has it.
    """
    serialization: Any = sys.modules.get("flax.serialization")
    if serialization is None:
        return

    def to_state_dict(record: Any) -> dict[str, Any]:
        leaves = enumerate(jax.tree.leaves(record))
        return {str(i): serialization.to_state_dict(leaf) for i, leaf in leaves}

    def from_state_dict(target: Any, state: dict[str, Any]) -> Any:
        leaves, structure = jax.tree.flatten(target)
        if len(state) != len(leaves):
            raise ValueError(
                f"{type(target).__name__}: expected the {len(leaves)} arrays of the target, got"
                f" {len(state)}; restore into the state of the same model."
            )
        restored = [
            serialization.from_state_dict(leaf, state[str(i)]) for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, restored)

    for record in (KFAC, KFACInverse, *Scalars.__subclasses__()):
        serialization.register_serialization_state(
            record, to_state_dict, from_state_dict, override=True
        )
