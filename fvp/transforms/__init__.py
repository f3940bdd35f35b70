"""Optax gradient transformations."""

from fvp.transforms.engine import NaturalGradientState
from fvp.transforms.kfac import KFACState, scale_by_kfac
from fvp.transforms.natural_gradient import natural_gradient, scale_by_fisher

__all__ = [
    "KFACState",
    "NaturalGradientState",
    "natural_gradient",
    "scale_by_fisher",
    "scale_by_kfac",
]
