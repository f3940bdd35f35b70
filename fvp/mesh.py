"""Batches split over mesh axes: sums across devices, rows that stay where they are, shared work.

Under ``jit`` with sharded arrays the compiler does all of this. Two cases need a word:
inside ``jax.shard_map`` (or a named ``vmap``) each device sees its own examples, and the caller
names the axes that the batch is split over; on a mesh with Explicit axes an operation must not
regroup sharded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

from fvp.compatibility import to_varying, varying_axes
from fvp.numerics import widen_tree
from fvp.typing import PyTree

AxisName = str | tuple[str, ...] | None


def to_local(tree: PyTree, axis_name: AxisName, name: str) -> Any:
    """The same values, typed as this device's own, so that derivatives in them stay local.

    Without it ``jax.shard_map`` (with ``check_vma=True``) sums cotangents over devices wherever a
    replicated value meets a split one: at every time step of a scan, and once more than the
    explicit sum of `sum_over` in all.
    """
    if axis_name is None:
        return tree
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = tuple(name for name in names if name in manual)  # a named vmap tracks nothing
    try:
        return to_varying(tree, names)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected leaves replicated over the mesh axes axis_name={axis_name!r}"
            " inside shard_map; leave sharded parameters to jit (without shard_map and axis_name)."
        ) from error


def check_axis_name(params: PyTree, z: Any) -> None:
    """Raises where ``z`` differs between devices, ``params`` do not, and no axis was named.

    JAX would then sum products over the devices, and nothing would sum the weights.
    """
    varying = varying_axes(z)
    for leaf in jax.tree.leaves(params):
        varying -= varying_axes(leaf)
    if varying:
        raise ValueError(
            f"axis_name: the batch is split over the mesh axes {sorted(varying)} inside shard_map;"
            " name them, axis_name=..., so that the mean is over all devices."
        )


def sum_over(tree: PyTree, axis_name: AxisName) -> Any:
    """Sum over devices, in float32 or wider."""
    return tree if axis_name is None else jax.lax.psum(widen_tree(tree), axis_name)


def device_count(axis_name: AxisName) -> int:
    """How many devices the batch is split over."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def row_axes(x: Array, axis: int = 0) -> Any:
    """The Explicit mesh axes that the example axis of ``x`` is sharded over, or None."""
    spec = jax.typeof(x).sharding.spec
    return spec[axis] if len(spec) else None


def shard_rows(x: Array, rows: Any, axis: int = 0) -> Array:
    """``x`` with its example axis sharded over the mesh axes ``rows``."""
    if rows is None:
        return x
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = rows
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def shard_count(rows: Any) -> int:
    """How many parts ``rows`` splits an axis into."""
    if rows is None:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    names = rows if isinstance(rows, tuple) else (rows,)
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def map_rows(function: Any, x: Array, rows: Any, in_axis: int, out_axis: int) -> Array:
    """``function`` of each device's rows: axis ``in_axis`` of ``x``, ``out_axis`` of the result."""
    if rows is None:
        return function(x)
    names = set(rows) if isinstance(rows, tuple) else {rows}
    in_spec = PartitionSpec(*[None] * in_axis, rows)
    out_spec = PartitionSpec(*[None] * out_axis, rows)
    return jax.shard_map(function, in_specs=in_spec, out_specs=out_spec, axis_names=names)(x)


def auto_sharded(
    function: Callable[..., Any], *args: Any, like: Any = None, specs: Any = None
) -> Any:
    """``function(*args)`` with Explicit mesh axes left to the compiler.

    For code that regroups rows freely. Its results are replicated, or sharded like the tree
    ``like``, or by the tree ``specs`` of partition specs.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function(*args)
    specs = PartitionSpec() if specs is None else specs
    if like is not None:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(function, out_sharding=specs)(*args)


def share_out(
    function: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float], mesh: Mesh
) -> tuple[Any, ...]:
    """``function(item)`` of every item, each made by one device of ``mesh`` and sent to all."""
    axes, owners = mesh.axis_names, balanced_owners(costs, mesh.size)

    def share(items: PyTree) -> Any:
        index, results = jax.lax.axis_index(axes), []
        for item, owner in zip(to_local(items, axes, "items"), owners, strict=True):
            shapes = jax.eval_shape(function, item)
            absent = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            absent = to_local(absent, axes, "items")
            mine = jax.lax.cond(index == owner, function, lambda _, absent=absent: absent, item)
            results.append(jax.lax.psum(mine, axes))
        return tuple(results)

    replicated = PartitionSpec()
    mapped = jax.shard_map(share, mesh=mesh, in_specs=replicated, out_specs=replicated)
    return mapped(tuple(items))


def balanced_owners(costs: Sequence[float], count: int) -> list[int]:
    """Which of ``count`` devices takes each item: the dearest first, to the least busy one."""
    load, owners = [0.0] * count, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[item] = min(range(count), key=load.__getitem__)
        load[owners[item]] += costs[item]
    return owners
