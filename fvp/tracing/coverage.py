"""What a capture did with each parameter, and errors where it could do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from fvp.tracing.capture import Capture
from fvp.tracing.uses import ParameterUse


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How each parameter is treated; prints as a table, and reads like a dictionary.

    Attributes:
      rows: (path, shape, treatment) of each parameter leaf.
    """

    rows: tuple[tuple[str, tuple[int, ...], str], ...]

    def __getitem__(self, path: str) -> str:
        for name, _, treatment in self.rows:
            if name == path:
                return treatment
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _, _ in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "shape", "treatment")]
        cells += [(path, str(shape), treatment) for path, shape, treatment in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in cells)


def coverage_of(layers: Capture, unhandled: Mapping[int, str] | None = None) -> Coverage:
    """The uses found for each parameter, in words.

    ``unhandled`` leaves, with the reason, are differentiated row by row, as those of unmatched uses
    are, and all where the model mixes examples.
    """
    lines, unhandled = [], unhandled or {}
    for leaf, (path, shape) in enumerate(zip(layers.paths, layers.shapes, strict=True)):
        unmatched = [use for use in layers.unmatched if use.view.leaf == leaf]
        uses = [use for use in layers.uses if use.view.leaf == leaf]
        if unmatched or leaf in unhandled:
            words = f"row by row: {unhandled.get(leaf) or unmatched[0].primitive}"
        elif layers.mixed is not None and uses:
            words = f"row by row: {layers.mixed.primitive}"
        else:
            words = " + ".join(_counted(layers, uses)) or "unused"
        lines.append((path, shape.shape, words))
    return Coverage(tuple(lines))


def _counted(layers: Capture, uses: list[ParameterUse]) -> list[str]:
    names = []
    for use in uses:
        owner = "" if use.joined is None else f" of {layers.paths[use.joined.view.leaf]}"
        names.append(treatment(use) + owner)
    unique = dict.fromkeys(names)
    return [name if names.count(name) == 1 else f"{names.count(name)} {name}" for name in unique]


def treatment(use: ParameterUse) -> str:
    """The kind of a use, and the primitives that the parameter goes through on its way there."""
    names = [name for function in use.view.functions for name in function.names]
    names += ["mul"] * use.view.weighted
    through = ", ".join(dict.fromkeys(names))
    groups = use.layout.shape[0]
    kind = use.kind
    if use.scattered and not use.is_elementwise:
        kind = f"scattered {kind}"
    elif use.is_elementwise and groups > 1 and use.joined is None and not use.scattered:
        kind += f" in {groups} blocks"
    return f"{kind} through {through}" if through else kind


def check_fallback(fallback: str | None) -> None:
    """Raises unless ``fallback`` is one there is."""
    if fallback not in (None, "per_example"):
        raise ValueError(f'fallback: expected None or "per_example", got {fallback!r}.')


def check_covered(layers: Capture, fallback: str | None) -> None:
    """Raises where a parameter has a use without a layer rule and there is no fallback."""
    if fallback is not None:
        return
    hint = 'pass fallback="per_example" to differentiate row by row instead'
    if (mixed := layers.mixed) is not None and mixed.ruled:
        raise ValueError(
            "model_fn: expected a model that treats the examples of the batch independently, but"
            f" {mixed.primitive!r} mixes them along the first axis (as BatchNorm in training does:"
            " give it its running averages, use_running_average=True, or model.eval()), so that no"
            f" parameter has a gradient for each example ({', '.join(layers.paths)}); or {hint}."
        )
    if mixed is not None:
        raise ValueError(
            f"model_fn: the examples cannot be followed through {mixed.primitive!r}, for which"
            f" there is no rule ({', '.join(layers.paths)}); {hint}."
        )
    for use in layers.unmatched:
        raise ValueError(
            f"{layers.paths[use.view.leaf]}: there is no layer rule for its use in"
            f" {use.primitive!r}, on a value of shape {use.view.shape}; {hint}, or"
            " move the operation out of model_fn."
        )
