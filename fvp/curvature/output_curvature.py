"""The z-space step of each curvature: the H between J v and J^T u, in J^T H J v."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from fvp.curvature.problem import Problem, example_indices
from fvp.heads import Head, Root
from fvp.mesh import auto_sharded, row_axes, shard_rows
from fvp.numerics import widen
from fvp.records import Record
from fvp.typing import PyTree


class OutputCurvature(Record, abc.ABC):
    """An (event x event) matrix H for each example, in the space of the outputs z; a pytree.

    The base of the library's curvatures, and of your own: a frozen dataclass that says how H is
    made at the outputs of a batch (`at`) and what it does to a change of them
    (`__call__`). `fvp.gauss_newton` makes an operator J^T H J of it, and the
    transformations take the class as ``curvature=``. Weights of examples are not its business.

    Examples:
      >>> import dataclasses, jax, jax.numpy as jnp, fvp
      >>> @dataclasses.dataclass(frozen=True)
      ... class SquaredError(fvp.OutputCurvature):
      ...     "The Gauss-Newton matrix of 1/2 |z - y|^2, whatever the head: H = I."
      ...     @classmethod
      ...     def at(cls, problem, z):
      ...         return cls()
      ...     def __call__(self, u):
      ...         return u
      >>> x, w = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 1))
      >>> model = lambda w, x: x @ w
      >>> G = fvp.gauss_newton(SquaredError, model, fvp.Sigmoid(), w, x)
      >>> print(G @ jnp.ones((2, 1)))
      [[12.]
       [17.]]
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherited = "root" not in vars(cls) and cls.root is not OutputCurvature.root
        if "__call__" in vars(cls) and inherited:
            raise TypeError(
                f"{cls.__name__}: __call__ is new, but root() that of another curvature; define it"
                " as well (return None where no root is known)."
            )

    #: Whether ``at`` reads the targets of the problem: True if they must be given, False if it
    #: must not see them (they may be another loss's), None if it takes what there is.
    reads_targets: ClassVar[bool | None] = None

    @classmethod
    @abc.abstractmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """The curvature at the outputs ``z``, with zeros where an example has no weight.

        ``problem`` holds the head and the targets, among others; see `Problem`.
        """

    @abc.abstractmethod
    def __call__(self, u: Array) -> Array:
        """H u for each example; ``u`` and the result have the shape of z, in float32 or wider."""

    def root(self) -> Root | None:
        """The columns of a root of H, S S^T = H; None, the default, where there is none known.

        Exact solves in the space of examples x outputs need it (`fvp.solve_dual`).
        """
        return None

    def __str__(self) -> str:
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class FisherCurvature(OutputCurvature):
    """F_R(z): the Fisher of the output distribution under its own labels, in closed form."""

    reads_targets: ClassVar[bool | None] = False

    head: Head
    z: Array

    @classmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """No label enters."""
        return cls(problem.head, widen(z))

    def __call__(self, u: Array) -> Array:
        return self.head.fisher(self.z, u)

    def root(self) -> Root | None:
        """That of the head."""
        return self.head.fisher_root(self.z)


@dataclasses.dataclass(frozen=True)
class HessianCurvature(OutputCurvature):
    """The Hessian of the negative log-likelihood in z, at the data's targets."""

    reads_targets: ClassVar[bool | None] = True

    head: Head
    z: Array
    targets: PyTree

    @classmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """At the targets of the problem."""
        return cls(problem.head, widen(z), problem.head.check_targets(z, problem.targets))

    def __call__(self, u: Array) -> Array:
        return self.head.hessian(self.z, self.targets, u)

    def root(self) -> Root | None:
        """That of the head, where its Hessian is known to be positive semi-definite."""
        return self.head.hessian_root(self.z, self.targets)

    def __str__(self) -> str:
        return f"the Hessian of {type(self.head).__name__}"


@dataclasses.dataclass(frozen=True)
class ScoreCurvature(OutputCurvature):
    """(1/S) sum_s score_s score_s^T, for S scores per example on a leading axis."""

    scores: Array
    event_ndim: int = dataclasses.field(metadata={"static": True})

    def __call__(self, u: Array) -> Array:
        axes = tuple(range(-self.event_ndim, 0))
        projections = jnp.sum(self.scores * u, axis=axes, keepdims=True)
        return jnp.mean(self.scores * projections, axis=0)

    def root(self) -> Root:
        """The scores themselves."""
        count = self.scores.shape[0]
        pick = lambda k: jnp.take(self.scores, k, axis=0, mode="clip")
        return Root(count, lambda k: pick(k) / math.sqrt(count))


@dataclasses.dataclass(frozen=True)
class EmpiricalCurvature(ScoreCurvature):
    """The outer product of the score at the data's own targets."""

    reads_targets: ClassVar[bool | None] = True

    @classmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """At the targets of the problem."""
        head = problem.head
        return cls(head.score(widen(z), problem.targets)[None], head.event_ndim)


@dataclasses.dataclass(frozen=True)
class SampledCurvature(ScoreCurvature):
    """Monte Carlo: scores at labels drawn from the model, once, when the curvature is made."""

    reads_targets: ClassVar[bool | None] = False

    @classmethod
    def at(cls, problem: Problem, z: Array) -> Self:
        """One score for each of the problem's keys.

        Each example draws from keys of its own, made from its index, so that the matrix depends
        neither on the size of the chunks nor on how the batch is sharded.
        """
        head, indices = problem.head, problem.indices
        if problem.keys is None:
            raise ValueError("keys: SampledCurvature draws labels; take fvp.mc_fisher(..., key).")
        if indices is None:
            indices = shard_rows(example_indices(z.shape[0], problem.shard), row_axes(z))

        def score(key: Array, index: Array, row: Array) -> Array:
            # Heads want a batch axis; a row of (B, C) outputs has none left.
            return head.sampled_score(jax.random.fold_in(key, index), row[None])[0]

        per_example = jax.vmap(score, in_axes=(None, 0, 0))
        per_sample = jax.vmap(per_example, in_axes=(0, None, None))
        # Up to jax 0.9 a vmapped draw knows nothing of Explicit axes.
        spec = PartitionSpec(None, *getattr(jax.typeof(z).sharding, "spec", ()))
        scores = auto_sharded(per_sample, problem.keys, indices, widen(z), specs=spec)
        return cls(scores, head.event_ndim)

    def root(self) -> Root:
        """The scores, independent of each other and of mean zero."""
        return super().root()._replace(independent=True)


def check_output_curvature(kind: Any, name: str) -> None:
    """Raises unless ``kind`` is a class of output curvatures."""
    if not (isinstance(kind, type) and issubclass(kind, OutputCurvature)):
        raise TypeError(f"{name}: expected a subclass of fvp.OutputCurvature, got {kind!r}.")
