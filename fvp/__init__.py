"""Natural gradients and Fisher-vector products for JAX."""

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
from fvp.solvers import CGInfo, cg
from fvp.transforms import NaturalGradientState, natural_gradient, scale_by_fisher

__all__ = [
    "CGInfo",
    "CurvatureOperator",
    "Gaussian",
    "NaturalGradientState",
    "Sigmoid",
    "Softmax",
    "cg",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "fisher",
    "fisher_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "mc_fisher",
    "natural_gradient",
    "scale_by_fisher",
]
