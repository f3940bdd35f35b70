"""Optax gradient transformations."""

from fvp.transforms.diagnostics import describe, diagnostics
from fvp.transforms.kfac import scale_by_kfac
from fvp.transforms.natural_gradient import natural_gradient, scale_by_fisher
from fvp.transforms.state import NaturalGradientState

__all__ = [
    "NaturalGradientState",
    "describe",
    "diagnostics",
    "natural_gradient",
    "scale_by_fisher",
    "scale_by_kfac",
]
