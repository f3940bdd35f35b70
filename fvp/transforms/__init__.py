"""Optax gradient transformations."""

from fvp.transforms.natural_gradient import (
    NaturalGradientState,
    natural_gradient,
    scale_by_fisher,
)

__all__ = ["NaturalGradientState", "natural_gradient", "scale_by_fisher"]
