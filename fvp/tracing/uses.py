"""Uses of a parameter, in one canonical layout.

A use multiplies a weight with inputs, and its gradient is a sum of products of an input and an
output's cotangent. Dense layers, convolutions (on patches) and lookups (of one-hot inputs) are of
this kind; shifts and scales are it with a single input of one. Here and in `fvp.layers` the
axes of arrays go by these letters:

    E  examples: what the model keeps apart, see `example_axes.py`
    R  rows: the positions of one example at which the same weight is used, such as tokens, the
       pixels of a convolution's output, or time steps; 1 where it is used once
    G  groups: weights side by side that never meet, such as attention heads, the feature groups of
       a convolution, or the slices of a parameter that a scan makes
    I  inputs of the weight
    O  outputs of the weight
    K  columns: cotangents of the model's output that are back-propagated together

For a weight (G, I, O), inputs x (E, R, G, I) and cotangents d (K, E, R, G, O) the gradient of
column k and example e is sum_r x[e, r, g, i] d[k, e, r, g, o].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from fvp.tracing.batch_axes import AxisInfo
from fvp.tracing.layouts import Layout
from fvp.tracing.parameter_views import ParameterView
from fvp.tracing.steps import Shape


@dataclasses.dataclass(eq=False)
class ParameterUse:
    """One use of one view of a parameter.

    Attributes:
      kind: "dense", "convolution", "lookup", "shift" or "scale"; "other" without a rule; "nothing"
        where a parameter that is part of the weight is none of what is read.
      view: the parameter on its way here.
      primitive: name of the JAX primitive.
      batch_axes: where each batch axis is in the output.
      shape: of the output, inside any scan; ``dtype`` likewise.
      shared_axes: the axes of the output along which the weight is shared: examples and rows.
      read_input: the other operand -> (shared axes ..., G, I); indices (shared axes ..., G) of a
        lookup; factors in the shape of the output for a scale.
      read_output: an array like the output -> (shared axes ..., G, O).
      parts: the axes of the view's core that are (groups, inputs, outputs).
      features: the axes of the output that are (groups, outputs), in this order.
      scans: the lengths of the enclosing scans, outermost first, and whether each scans over the
        parameter ("stacked") or shares it ("shared").
      joined: for a shift, the use whose output it shifts, where nothing else reads that.
      kept: the groups, inputs and outputs that are this parameter's, where others are not.
      scattered: whether the entries that are this parameter's are no such block of the weight.
    """

    kind: str
    view: ParameterView
    primitive: str
    batch_axes: tuple[AxisInfo, ...]
    shape: Shape
    shared_axes: tuple[int, ...] = ()
    read_input: Callable[[Any], Any] = lambda x: x
    read_output: Callable[[Any], Any] = lambda x: x
    parts: tuple[tuple[int, ...], ...] = ((), (), ())
    features: tuple[int, ...] = ()
    scans: tuple[tuple[str, int], ...] = ()
    joined: ParameterUse | None = None
    dtype: DTypeLike | None = None
    kept: tuple[tuple[int, ...], ...] | None = None
    scattered: bool = False

    @property
    def layout(self) -> Layout:
        """How the parameter is the weight (G, I, O) of this use."""
        return Layout(dataclasses.replace(self.view, factor=None), self.parts, self.kept)

    @property
    def is_layer(self) -> bool:
        """Whether there is a layer rule for this kind of use."""
        return self.kind not in ("other", "nothing")

    @property
    def is_elementwise(self) -> bool:
        """Whether the parameter is added to a value, or multiplied with it entry by entry."""
        return self.kind in ("shift", "scale")
