"""Optax gradient transformations."""

from fvp.transforms.engine import NaturalGradientState
from fvp.transforms.natural_gradient import natural_gradient, scale_by_fisher

__all__ = ["NaturalGradientState", "natural_gradient", "scale_by_fisher"]
