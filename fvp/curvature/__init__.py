"""Curvature operators: the formula F v = E[J^T H J] v, linearised once."""

from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.operators import empirical_fisher, fisher, ggn, hessian, mc_fisher
from fvp.curvature.products import (
    empirical_fisher_vector_product,
    fisher_vector_product,
    ggn_vector_product,
)

__all__ = [
    "CurvatureOperator",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "fisher",
    "fisher_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "mc_fisher",
]
