"""Curvature operators: the formula F v = E[J^T H J] v, linearised once."""

from fvp.curvature.linearized import LinearizedCurvature
from fvp.curvature.operator import CurvatureOperator
from fvp.curvature.operators import (
    empirical_fisher,
    fisher,
    gauss_newton,
    ggn,
    hessian,
    mc_fisher,
)
from fvp.curvature.output_curvature import (
    EmpiricalCurvature,
    FisherCurvature,
    HessianCurvature,
    OutputCurvature,
    SampledCurvature,
)
from fvp.curvature.problem import Problem
from fvp.curvature.products import (
    empirical_fisher_vector_product,
    fisher_vector_product,
    gauss_newton_vector_product,
    ggn_vector_product,
)
from fvp.curvature.true_versus_rest import TrueVersusRest

__all__ = [
    "CurvatureOperator",
    "EmpiricalCurvature",
    "FisherCurvature",
    "HessianCurvature",
    "LinearizedCurvature",
    "OutputCurvature",
    "Problem",
    "SampledCurvature",
    "TrueVersusRest",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "fisher",
    "fisher_vector_product",
    "gauss_newton",
    "gauss_newton_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "mc_fisher",
]
