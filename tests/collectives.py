"""What a compiled program sends between devices, read from its HLO text."""

import dataclasses
import math
import re

BYTES = {"pred": 1, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation; ``shapes`` of its results on one device, sorted by size."""

    kind: str
    in_loop: bool
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def _arrays(text):
    """(dtype, shape) of every array type in ``text``."""
    found = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", text)
    return [(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in found]


def _computations(hlo):
    """The lines of each computation, by its name."""
    computations, name = {}, None
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[1]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def _called(lines, attributes):
    text = "\n".join(lines)
    return set(re.findall(rf"(?:{attributes})=%?([\w.\-]+)", text))


def _loops(computations):
    """Names of the computations that a loop runs, at any depth."""
    seen, todo = set(), {n for c in computations.values() for n in _called(c, "body|condition")}
    while todo:
        name = todo.pop()
        seen.add(name)
        callees = _called(
            computations[name], "to_apply|calls|body|condition|(?:true|false)_computation"
        )
        todo |= callees - seen
    return seen


def collectives(compiled):
    """All collectives of a compiled function."""
    computations = _computations(compiled.as_text())
    loops, found = _loops(computations), []
    for name, lines in computations.items():
        for line in lines:
            match = re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line)
            if match:
                arrays = _arrays(match[1])
                size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
                shapes = tuple(tuple(sorted(shape)) for _, shape in arrays)
                found.append(Collective(match[2], name in loops, shapes, size))
    return found


def total_bytes(found, kind, in_loop=None):
    """Bytes of the results of all collectives of one kind, in loops or outside or anywhere."""
    return sum(c.bytes for c in found if c.kind == kind and in_loop in (None, c.in_loop))


def loop_state_shapes(compiled):
    """For each loop of the program the shapes, on one device, of all arrays that it carries."""
    states = re.findall(r" = (\(.*?\)) while\(", compiled.as_text())
    return [[shape for _, shape in _arrays(state)] for state in states]
