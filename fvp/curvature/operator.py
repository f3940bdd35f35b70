"""The operator that users hold: a mean curvature that multiplies trees like the parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fvp.checks import check_like, check_positive_int
from fvp.compilation import compiled_when_eager
from fvp.curvature.chunked import Chunked, example_count
from fvp.curvature.linearized import Linearize, LinearizedCurvature
from fvp.curvature.problem import Problem
from fvp.mesh import AxisName, sum_over, to_local
from fvp.numerics import cast_like, power_of_two, wide_dtype, widen
from fvp.records import Record
from fvp.typing import Params, PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class CurvatureOperator(Record):
    """A curvature of the mean loss L = sum_i w_i nll_i / sum_i w_i, linearised once.

    Built by `fvp.fisher` and its siblings. A pytree: it can be returned from ``jit``, passed
    to it, and closed over; ``vmap`` over the vector works. Calls are compiled when made eagerly.

    Attributes:
      linearized: the curvature of the summed loss.
      total: sum of the weights.
      scale: of what is summed, a power of two that keeps sums in half precision in range.
      template: structure, shapes and dtypes of the parameters.
      axis_name: mesh axes that the batch is split over inside ``shard_map``.
      averaged: whether the scale is 1 / total instead, and sums are means.
      problem: what was linearised, for solvers that need more than products; None in chunks.
      layout: of outputs by name in the one array that ``linearized`` has; else None.
    """

    linearized: LinearizedCurvature
    total: Array
    scale: Array
    template: Any = dataclasses.field(metadata={"static": True})
    axis_name: AxisName = dataclasses.field(metadata={"static": True})
    averaged: bool = dataclasses.field(metadata={"static": True})
    problem: Problem | None = None
    layout: Any = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls, linearized: LinearizedCurvature, problem: Problem, z: Any, *, keep: bool
    ) -> CurvatureOperator:
        """The mean of ``linearized`` over the examples of the outputs ``z``, or their shape."""
        leaves, structure = jax.tree.flatten(problem.params)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        total, count = problem.total_weight(z), math.prod(problem.head.batch_shape(z))
        # A model in half precision sums over examples in half precision: neither a sum of large
        # terms nor terms divided by a large total beforehand would stay in its range, but terms
        # near 1 / sqrt(count) do. A power of two, so that nothing is rounded.
        # In wider dtypes 1 / total does as well, and saves a pass over the parameters at the end.
        wide = all(x.dtype == wide_dtype(x.dtype) for x in (*shapes, *jax.tree.leaves(z)))
        averaged = wide and problem.weights is None
        scale = 1 / total if averaged else power_of_two(math.sqrt(count) / jnp.abs(total))
        kept = problem if keep else None
        template, layout = (structure, shapes), problem.model.layout
        return cls(linearized, total, scale, template, problem.axis_name, averaged, kept, layout)

    @property
    def like(self) -> Any:
        """Shapes and dtypes of the parameters, as a tree of ``jax.ShapeDtypeStruct``."""
        structure, shapes = self.template
        return jax.tree.unflatten(structure, shapes)

    @property
    def output(self) -> Any:
        """The model's output z, from the same linearisation; a dict of them for fvp.Product."""
        z = self.linearized.output
        return z if self.layout is None else self.layout.split(z, self.layout.dtypes)

    def mv(self, v: Params) -> Params:
        """The curvature times ``v``: one linear JVP, the z-space scaling, one linear VJP.

        Args:
          v: pytree of the structure and shapes of the parameters; cast to their dtypes.

        Returns:
          A pytree like the parameters.

        Raises:
          ValueError: if the structure or a shape differs from the parameters'.
          TypeError: if a leaf is not floating-point.
        """
        return _product(self, check_like(v, self.like, "v", "params"))

    def __matmul__(self, v: Params) -> Params:
        return self.mv(v)

    def mv_and_form(self, v: Params) -> tuple[Params, Array]:
        """The product with ``v`` and v^T (curvature) v, at the cost of the product alone."""
        return _product_and_form(self, check_like(v, self.like, "v", "params"))

    def transpose_product(self, u: Any) -> Params:
        """J^T H_L u for a change ``u`` of the outputs; of curvatures J^T H_L J that hold J."""
        u = u if self.layout is None else self.layout.join(u)
        return self._mean(self.linearized.transpose_product(u, self.scale))

    def gradient_after(self, v: Params, targets: PyTree) -> Params:
        """The gradient of the mean loss at ``targets`` plus the product with ``v``.

        Of curvatures J^T H_L J that hold J; added up in the space of the outputs, it keeps its
        digits where the two cancel.
        """
        v = check_like(v, self.like, "v", "params")
        return self._mean(self.linearized.gradient_after(v, targets, self.scale))

    def quadratic_form(self, v: Params) -> Array:
        """v^T (curvature) v as a scalar in float32 or wider; costs one JVP where z suffices."""
        return self.inner_products(v)[0, 0]

    def inner_products(self, *vectors: Params) -> Array:
        """The matrix of v_i^T (curvature) v_j; costs one JVP for each vector where z suffices."""
        like = self.like
        return _inner_products(self, [check_like(v, like, "v", "params") for v in vectors])

    def value_and_grad(self, targets: PyTree) -> tuple[Array, Params]:
        """The mean loss at ``targets`` and its gradient, from the same linearisation.

        Saves the forward pass that ``jax.value_and_grad`` would repeat; pass the gradient and this
        operator to ``tx.update(gradient, state, params, operator=self)``.
        """
        return _value_and_grad(self, targets)

    def dense(self, *, max_bytes: float = 2.0**33) -> Array:
        """The (P, P) matrix in ``ravel_pytree`` order, for small P.

        Args:
          max_bytes: most memory that the matrix may take, eight GiB.

        Raises:
          ValueError: naming the bytes of a larger matrix.
        """
        shapes = self.template[1]
        size = sum(math.prod(shape.shape) for shape in shapes)
        dtypes = [shape.dtype for shape in shapes]
        wanted = size**2 * (jnp.result_type(*dtypes).itemsize if dtypes else 0)
        if wanted > max_bytes:
            raise ValueError(
                f"dense: the ({size}, {size}) matrix would take {wanted:,} bytes"
                f" ({wanted / 2**30:.1f} GiB), more than max_bytes={max_bytes:,.0f}; multiply by"
                " the operator instead, F @ v, or pass a larger max_bytes."
            )
        from fvp.layers.dense import dense_matrix  # layers stand on curvatures: not above

        return dense_matrix(self)

    def _mean(self, tree: PyTree) -> PyTree:
        # Where all weights are zero the total is infinite, and nothing that was summed counts.
        none = self.total == jnp.inf
        mean = lambda x: jnp.where(none, 0, widen(x) / (self.total * self.scale))
        summed = sum_over(tree, self.axis_name)
        return summed if self.averaged else cast_like(jax.tree.map(mean, summed), tree)

    def __repr__(self) -> str:
        size = sum(math.prod(leaf.shape) for leaf in self.template[1])
        return f"CurvatureOperator({type(self.linearized).__name__}, parameters={size})"


def build_operator(
    linearize: Linearize, problem: Problem, chunk_size: int | None
) -> CurvatureOperator:
    """Linearises ``problem``, whole or in chunks; compiled when called eagerly."""
    if chunk_size is not None:
        check_positive_int(chunk_size, "chunk_size")
        if chunk_size < example_count(problem):
            return _in_chunks(linearize, problem, chunk_size)
    return _whole(linearize, problem)


@compiled_when_eager
def _whole(linearize: Linearize, problem: Problem) -> CurvatureOperator:
    problem = problem.present()
    linearized = linearize(problem)
    problem.check_outputs(linearized.output)
    return CurvatureOperator.of(linearized, problem, linearized.output, keep=True)


@compiled_when_eager
def _in_chunks(linearize: Linearize, problem: Problem, chunk_size: int) -> CurvatureOperator:
    chunked = Chunked.of(linearize, problem, chunk_size)
    z = jax.eval_shape(problem.outputs, problem.params)
    return CurvatureOperator.of(chunked, problem, z, keep=False)


@compiled_when_eager
def _product(operator: CurvatureOperator, v: Params) -> Params:
    v = to_local(v, operator.axis_name, "v")
    return operator._mean(operator.linearized.product(v, operator.scale))


@compiled_when_eager
def _product_and_form(operator: CurvatureOperator, v: Params) -> tuple[Params, Array]:
    v = to_local(v, operator.axis_name, "v")
    return operator._mean(operator.linearized.product_and_form(v, operator.scale))


@compiled_when_eager
def _inner_products(operator: CurvatureOperator, vectors: list[Params]) -> Array:
    vectors = to_local(vectors, operator.axis_name, "v")
    return operator._mean(operator.linearized.inner_products(vectors, operator.scale))


@compiled_when_eager
def _value_and_grad(operator: CurvatureOperator, targets: PyTree) -> tuple[Array, Params]:
    return operator._mean(operator.linearized.value_and_gradient(targets, operator.scale))
