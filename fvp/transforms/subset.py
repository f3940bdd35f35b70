"""Part of the parameters: what ``optax.masked`` and ``optax.partition`` leave of a tree."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fvp.typing import Batch, ModelFn, Params


class OnSubset:
    """``model_fn`` as a function of the unmasked leaves alone; hashes like the model function."""

    def __init__(self, model_fn: ModelFn) -> None:
        self._model_fn = model_fn

    def __call__(self, params: Params, batch: Batch) -> Any:
        batch, all_params = batch
        return self._model_fn(fill_masked(params, all_params), batch)


def fill_masked(params: Params, all_params: Params) -> Any:
    """``params`` with its masked leaves and subtrees taken from ``all_params``."""
    return jax.tree.map(
        lambda leaf, full: full if isinstance(leaf, optax.MaskedNode) else leaf,
        params,
        all_params,
        is_leaf=_is_masked_node,
    )


def has_masked_nodes(params: Params) -> bool:
    """Whether part of the tree is hidden."""
    return any(_is_masked_node(x) for x in jax.tree.leaves(params, is_leaf=_is_masked_node))


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
