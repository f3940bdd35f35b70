"""Natural gradients and Fisher-vector products for JAX."""

import importlib
from typing import Any

from fvp.curvature import (
    CurvatureOperator,
    empirical_fisher,
    empirical_fisher_vector_product,
    fisher,
    fisher_vector_product,
    ggn,
    ggn_vector_product,
    hessian,
    mc_fisher,
)
from fvp.heads import Gaussian, Sigmoid, Softmax
from fvp.layers import Coverage, fisher_diagonal
from fvp.solvers import CGInfo, cg
from fvp.transforms import NaturalGradientState, natural_gradient, scale_by_fisher

__all__ = [
    "CGInfo",
    "Coverage",
    "CurvatureOperator",
    "Gaussian",
    "NaturalGradientState",
    "Sigmoid",
    "Softmax",
    "cg",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "fisher",
    "fisher_diagonal",
    "fisher_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "mc_fisher",
    "natural_gradient",
    "scale_by_fisher",
]


def __getattr__(name: str) -> Any:
    # Flax is optional: its helpers are imported when they are first used.
    if name in ("linen", "nnx"):
        return importlib.import_module(f"fvp.{name}")
    raise AttributeError(f"module 'fvp' has no attribute {name!r}")
