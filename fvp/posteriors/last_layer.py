"""The dense matrix of the last layer; all other parameters are known."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
from jax import Array
from jax.tree_util import Partial

from fvp.curvature import Problem
from fvp.layers.captured_batch import capture_of
from fvp.model import Model
from fvp.posteriors.dense import DenseStructure
from fvp.posteriors.structure import Options
from fvp.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class LastLayerStructure(DenseStructure):
    """H over the leaves with these ``numbers``, in their order."""

    numbers: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        """Of the layer that is used last, or of the leaves that the options name."""
        numbers = options.last_layer or _last_layer(problem)
        leaves, structure = jax.tree.flatten(problem.params)
        model = Partial(_Restricted(structure, numbers), problem.model, leaves)
        part = _pick(leaves, numbers)
        whole = DenseStructure.of(
            dataclasses.replace(problem, model=Model.of(model), params=part), options
        )
        return cls(whole.matrix, numbers)

    def random(self, params: Params) -> list[Array]:
        """The leaves of the last layer."""
        return _pick(jax.tree.leaves(params), self.numbers)

    def fill(self, params: Params, part: list[Array]) -> Params:
        """``params`` with those leaves replaced."""
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, _placed(leaves, self.numbers, part))


@dataclasses.dataclass(frozen=True)
class _Restricted:
    """A model as a function of some leaves of its parameters; hashes by what it is."""

    structure: Any
    numbers: tuple[int, ...]

    def __call__(self, model: Model, leaves: list[Array], part: list[Array], batch: Batch) -> Array:
        leaves = _placed(leaves, self.numbers, part)
        return model(jax.tree.unflatten(self.structure, leaves), batch)


def _pick(leaves: list[Any], numbers: tuple[int, ...]) -> list[Any]:
    return [leaves[number] for number in numbers]


def _placed(leaves: list[Any], numbers: tuple[int, ...], part: list[Any]) -> list[Any]:
    leaves = list(leaves)
    for number, leaf in zip(numbers, part, strict=True):
        leaves[number] = leaf
    return leaves


def _last_layer(problem: Problem) -> tuple[int, ...]:
    """The leaf that the model uses last; where that is a bias, its weight as well."""
    uses = capture_of(problem).uses
    if not uses:
        raise ValueError(
            'structure: "last_layer" finds no layer of the model that it knows; name its leaves,'
            " last_layer=(a tree of bools like the parameters)."
        )
    last = uses[-1]
    leaves = {last.view.leaf} if last.joined is None else {last.view.leaf, last.joined.view.leaf}
    return tuple(sorted(leaves))
