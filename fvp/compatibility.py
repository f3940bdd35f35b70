"""What differs between the versions of JAX and Flax that fvp runs on; nothing else asks for one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

#: From jax 0.12 on every jaxpr is closed, and this is its class.
ClosedJaxpr: Any = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

#: The names that the equation of an inner ``jax.jit`` goes by.
JIT = ("jit", "pjit")

#: Whether XLA sums one entry at a time on CPU: 1.2 ns each, measured up to jax 0.10.1. From 0.11
#: on its sums are as fast as its products.
SUMS_SLOWLY = jax.__version_info__ < (0, 11)

#: Versions of JAX that are excluded, and why. Measured on CPU, each with 10,000 to 300,000 rows of
#: 1 to 16 columns in both dtypes: 0.9.2, 0.10.1, 0.11.1, 0.11.2, 0.12.0 and 0.12.0.1 are right.
BROKEN = {
    "0.10.2": "it computes wrong row-wise quadratic forms on CPU (jax issue 39103)",
    "0.11.0": "it crashes or hangs in sums over arrays of many axes on CPU (jax issue 39257)",
}


def warn_if_broken(version: str) -> None:
    """Warns where ``version`` of JAX is one of those."""
    if version in BROKEN:
        warnings.warn(
            f"fvp: jax {version} is not supported: {BROKEN[version]}; install another version.",
            stacklevel=3,
        )


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of ``equation`` for other operands, in the context that it was traced in."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Up to jax 0.10.0 the functions come apart from the other parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.12 on they are the parts of a tree.
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a surrounding ``jax.shard_map`` over which ``x``, or its shape, differs."""
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if not hasattr(kind, "manual_axis_type"):  # up to jax 0.9
        return frozenset(getattr(kind, "vma", None) or ())
    return frozenset() if kind.manual_axis_type is None else kind.manual_axis_type.varying


def to_varying(tree: Any, names: tuple[str, ...]) -> Any:
    """The same values, typed as different on each device along the mesh axes ``names``."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(tree, names, to="varying")
    return vars(jax.lax)["pvary"](tree, names)


def pure_state(state: Any) -> Any:
    """A Flax NNX state as a tree of plain arrays that no later call changes."""
    from flax import nnx

    return (nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure)(state)
