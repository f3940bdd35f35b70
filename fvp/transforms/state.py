"""What the transformations keep between steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array


class NaturalGradientState(NamedTuple):
    """State of the transformations: of one for all of them."""

    count: Any  # int32 scalar, updates done
    # Like the parameters, or None: the last solution, for warm start and momentum; where noise
    # leads the mean of the gradients that wait for a step.
    direction: Any
    control: Any  # state of the damping rule
    solver: Any  # state of the solver
    damping: Array  # float32 scalar, of the last step
    iterations: Array  # int32 scalar, CG iterations of the last step
    residual_norm: Array  # float32 scalar, of the last solve
    predicted_kl: Array  # float32 scalar, 1/2 s^T (curvature) s for the step s; 0 if rejected
    accepted: Array  # bool scalar; a step that was not is zeros, or takes back the last ones
    gradient_mismatch: Array  # bool scalar, what the last rejected step found, see scale_by_fisher
    noise: Any  # a NoiseState where nothing was set that noise would override, else None
