"""Flops and bytes of whole programs: loops count as often as they run.

XLA's own cost analysis counts the body of a loop once, which for a scan over layers inside a loop
of conjugate gradients is off by their product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr

from fvp.compatibility import ClosedJaxpr

BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def matmul_flops(jaxpr: Jaxpr, trips: int) -> int:
    """Flops of all matrix products; ``trips`` is how often each while loop runs."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        times = {"scan": params.get("length"), "while": trips}.get(name, 1)
        total += times * sum(matmul_flops(inner, trips) for inner in _inner(params.values()))
    return total


def _inner(values: Any) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)


def collective_bytes(hlo: str, trips: int) -> int:
    """Bytes of the results of all collectives on one device of a compiled program.

    ``trips`` is how often a loop runs whose count the compiler does not know.
    """
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)

    def count(name: str) -> int:
        total = 0
        for line in computations.get(name, []):
            if match := re.search(rf" = (.*?) (?:{COLLECTIVES})(?:-start)?\(", line):
                total += _array_bytes(match[1])
            if body := re.search(r"body=%?([\w.\-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += (int(known[1]) if known else trips) * count(body[1])
            elif called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                total += count(called[1])
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                total += max(count(branch.strip(" %")) for branch in branches[1].split(","))
        return total

    return count(entry)


def _array_bytes(text: str) -> int:
    """Bytes of every array type in ``text``."""
    arrays = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", text)
    return sum(BYTES[kind] * math.prod(map(int, filter(None, s.split(",")))) for kind, s in arrays)
