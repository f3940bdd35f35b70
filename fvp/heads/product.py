"""Independent outputs of several distributions, side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from fvp.heads.head import Head, check_head
from fvp.heads.joined_product import JoinedProduct
from fvp.heads.named import Named
from fvp.heads.output_layout import OutputLayout
from fvp.heads.root import Root


@dataclasses.dataclass(frozen=True)
class Product(Head):
    """Independent outputs of several heads; ``z``, ``y`` and vectors are dicts with their names.

    nll = sum_k c_k nll_k with the weights c_k, and so every score is c_k score_k, every F_R and
    every Hessian that of the part times c_k, S its root times sqrt(c_k), KL = sum_k c_k KL_k. All
    outputs have the same batch axes; each has the event axes of its head.

    A model that returns such a dict works wherever others do; ``F.output`` is the dict again. What
    is between sees one array, (batch axes, D), with the outputs flattened in the order of their
    names.

    Args:
      heads: the head of each output, {name: head}.
      weights: the c_k, {name: number of 0 or more} with the same names, or None for ones. Those of
        examples are ``weights=`` of the curvature.

    Raises:
      TypeError: where a head is none, or the outputs are no dict.
      ValueError: for names that differ from those of the heads, and unequal batch axes.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> heads = {"kind": fvp.Softmax(), "size": fvp.Gaussian()}
      >>> head = fvp.Product(heads, weights={"kind": 1.0, "size": 4.0})
      >>> model = lambda w, x: {"kind": x @ w["kind"], "size": x @ w["size"]}
      >>> w, x = {"kind": jnp.zeros((2, 2)), "size": jnp.ones((2, 1))}, jnp.eye(2)
      >>> F = fvp.fisher(model, head, w, x)
      >>> print((F @ w)["size"].T)  # half the examples have a one there, times 4
      [[2. 2.]]
    """

    heads: Any
    weights: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.heads, Mapping) or not self.heads:
            raise TypeError(f"heads: Product expects {{name: head}}, got {self.heads!r}.")
        for name, head in self.heads.items():
            check_head(head, f" as heads[{name!r}]")
            if isinstance(head, Product):
                raise TypeError(f"heads[{name!r}]: a Product of Products is one, of all the names.")
        object.__setattr__(self, "heads", Named(self.heads))
        if self.weights is not None:
            _check_weights(self.weights, self.heads)
            object.__setattr__(self, "weights", Named(self.weights))

    def weight(self, name: str) -> Any:
        """The weight of an output."""
        return 1 if self.weights is None else self.weights[name]

    def on_one_array(self, outputs: Callable[[], Any]) -> tuple[Head, OutputLayout]:
        """The same over (batch axes, D) arrays, and how the outputs become one."""
        z = jax.eval_shape(outputs)
        self.check_outputs(z)
        names = tuple(self.heads)
        event = lambda name: z[name].shape[len(self.batch_shape(z)) :]
        layout = OutputLayout(names, tuple(map(event, names)), tuple(z[n].dtype for n in names))
        return JoinedProduct(self, layout), layout

    def batch_shape(self, z: Any) -> tuple[int, ...]:
        """The batch axes, which all outputs share."""
        name = next(iter(self.heads))
        return self.heads[name].batch_shape(z[name])

    def check_outputs(self, z: Any, name: str = "z") -> None:
        """Raises unless ``z`` has an output for each head, all with the same batch axes."""
        self._check_names(z, name, "the model's outputs")
        for part, head in self.heads.items():
            head.check_outputs(z[part], f"{name}[{part!r}]")
        shapes = {part: head.batch_shape(z[part]) for part, head in self.heads.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"{name}: Product expects the same batch axes in all outputs, got {shapes};"
                " residuals of unequal numbers of rows become one vector by fvp.stack_residuals,"
                " under one head (see 'Exact steps' in the documentation of layers)."
            )

    def check_targets(self, z: Any, y: Any) -> Any:
        """Raises unless there are targets for each head; returns them as arrays."""
        self.check_outputs(z)
        self._check_names(y, "targets", "the targets")
        return self._each(lambda head, z, y: head.check_targets(z, y), z, y)

    def _check_names(self, tree: Any, name: str, what: str) -> None:
        if not isinstance(tree, Mapping):
            raise TypeError(
                f"{name}: Product expects a dict of {what} with the names {list(self.heads)}, got"
                f" {type(tree).__name__}."
            )
        if set(tree) != set(self.heads):
            raise ValueError(
                f"{name}: Product expects {what} under the names {list(self.heads)}, got"
                f" {sorted(map(str, tree))}."
            )

    def _each(self, function: Callable[..., Any], *trees: Any) -> dict[str, Any]:
        """``function(head, part of each tree)`` by name."""
        return {n: function(head, *(tree[n] for tree in trees)) for n, head in self.heads.items()}

    def _scaled(self, parts: dict[str, Any], power: float = 1.0) -> dict[str, Any]:
        """Each part times its weight to a power."""
        scale = lambda name, x: jnp.asarray(self.weight(name), x.dtype) ** power * x
        return {name: scale(name, x) for name, x in parts.items()}

    def _total(self, parts: dict[str, Array]) -> Array:
        """The weighted sum of scalars of each example."""
        return functools.reduce(jnp.add, self._scaled(parts).values())

    def _nll(self, z: Any, y: Any) -> Array:
        return self._total(self._each(lambda head, z, y: head._nll(z, y), z, y))

    def _relative_nll(self, z: Any, y: Any) -> Array:
        return self._total(self._each(lambda head, z, y: head._relative_nll(z, y), z, y))

    def _mean(self, z: Any) -> Any:
        return self._each(lambda head, z: head._mean(z), z)

    def _sample(self, key: Array, z: Any, dtype: DTypeLike) -> Any:
        keys = dict(zip(self.heads, jax.random.split(key, len(self.heads)), strict=True))
        return self._each(lambda head, key, z: head._sample(key, z, dtype), keys, z)

    def sampled_score(self, key: Array, z: Any) -> Any:
        """A random vector with E[s s^T] = F_R(z): scores at samples, times sqrt(c_k)."""
        keys = dict(zip(self.heads, jax.random.split(key, len(self.heads)), strict=True))
        scores = self._each(lambda head, key, z: head.sampled_score(key, z), keys, z)
        return self._scaled(scores, 0.5)

    def _score(self, z: Any, y: Any) -> Any:
        return self._scaled(self._each(lambda head, z, y: head._score(z, y), z, y))

    def _fisher(self, z: Any, u: Any) -> Any:
        return self._scaled(self._each(lambda head, z, u: head._fisher(z, u), z, u))

    def _hessian(self, z: Any, y: Any, u: Any) -> Any:
        return self._scaled(self._each(lambda head, z, y, u: head._hessian(z, y, u), z, y, u))

    def _sqrt_fisher(self, z: Any, w: Any) -> Any:
        return self._scaled(self._each(lambda head, z, w: head._sqrt_fisher(z, w), z, w), 0.5)

    def _sqrt_fisher_transpose(self, z: Any, u: Any) -> Any:
        parts = self._each(lambda head, z, u: head._sqrt_fisher_transpose(z, u), z, u)
        return self._scaled(parts, 0.5)

    def _kl(self, z: Any, z_new: Any) -> Array:
        return self._total(self._each(lambda head, z, z_new: head._kl(z, z_new), z, z_new))

    def _fisher_root(self, z: Any) -> Root:
        raise TypeError("fisher_root: a Product has its columns in one array; see on_one_array.")


def _check_weights(weights: Any, heads: Any) -> None:
    if not isinstance(weights, Mapping) or set(weights) != set(heads):
        raise ValueError(
            f"weights: Product expects one number for each of {list(heads)}, got {weights!r}; those"
            " of examples are weights= of the curvature."
        )
    for name, weight in weights.items():
        if jnp.ndim(weight) != 0 or (not isinstance(weight, Tracer) and not weight >= 0):
            raise ValueError(
                f"weights[{name!r}]: expected one number of 0 or more, got {weight!r}."
            )
