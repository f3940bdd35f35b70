"""Natural gradients and Fisher-vector products for JAX."""

import importlib
from typing import Any

import jax

from fvp.attribution import influence
from fvp.compatibility import warn_if_broken
from fvp.control import DampingRule, FixedDamping, LevenbergMarquardt, Observation, ReductionRatio
from fvp.curvature import (
    CurvatureOperator,
    EmpiricalCurvature,
    FisherCurvature,
    HessianCurvature,
    OutputCurvature,
    Problem,
    SampledCurvature,
    TrueVersusRest,
    empirical_fisher,
    empirical_fisher_vector_product,
    fisher,
    fisher_vector_product,
    gauss_newton,
    gauss_newton_vector_product,
    ggn,
    ggn_vector_product,
    hessian,
    mc_fisher,
)
from fvp.datasets import DatasetOperator, dataset_operator, mean_over_batches
from fvp.estimation import CurvatureComparison, compare_curvatures, eigenpairs, trace
from fvp.heads import (
    ExponentialFamily,
    FromDistribution,
    Gaussian,
    Head,
    LearnedScaleGaussian,
    Multinomial,
    NaturalHead,
    Poisson,
    Product,
    Root,
    Sigmoid,
    Softmax,
    StudentT,
)
from fvp.layers import KFAC, Coverage, KFACInverse, fisher_diagonal, kfac
from fvp.posteriors import Posterior, laplace
from fvp.preconditioners import (
    Jacobi,
    Preconditioner,
    diagonal_preconditioner,
    nystrom_preconditioner,
)
from fvp.residuals import stack_residuals
from fvp.solvers import (
    CG,
    Auto,
    CGInfo,
    DampedCurvature,
    DampedSolver,
    DampedSystem,
    Dense,
    Dual,
    KFACSolver,
    KFACState,
    cg,
    solve_dual,
)
from fvp.statistics import (
    Estimate,
    Summary,
    confidence_intervals,
    delta_method,
    density_fisher,
    ewc_penalty,
    fisher_divergence,
    kl_divergence,
    parameter_covariance,
    score_fisher,
    standard_errors,
    summary,
)
from fvp.transforms import (
    NaturalGradientState,
    describe,
    diagnostics,
    natural_gradient,
    scale_by_fisher,
    scale_by_kfac,
)

__all__ = [
    "CG",
    "KFAC",
    "Auto",
    "CGInfo",
    "Coverage",
    "CurvatureComparison",
    "CurvatureOperator",
    "DampedCurvature",
    "DampedSolver",
    "DampedSystem",
    "DampingRule",
    "DatasetOperator",
    "Dense",
    "Dual",
    "EmpiricalCurvature",
    "Estimate",
    "ExponentialFamily",
    "FisherCurvature",
    "FixedDamping",
    "FromDistribution",
    "Gaussian",
    "Head",
    "HessianCurvature",
    "Jacobi",
    "KFACInverse",
    "KFACSolver",
    "KFACState",
    "LearnedScaleGaussian",
    "LevenbergMarquardt",
    "Multinomial",
    "NaturalGradientState",
    "NaturalHead",
    "Observation",
    "OutputCurvature",
    "Poisson",
    "Posterior",
    "Preconditioner",
    "Problem",
    "Product",
    "ReductionRatio",
    "Root",
    "SampledCurvature",
    "Sigmoid",
    "Softmax",
    "StudentT",
    "Summary",
    "TrueVersusRest",
    "cg",
    "compare_curvatures",
    "confidence_intervals",
    "dataset_operator",
    "delta_method",
    "density_fisher",
    "describe",
    "diagnostics",
    "diagonal_preconditioner",
    "eigenpairs",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "ewc_penalty",
    "fisher",
    "fisher_diagonal",
    "fisher_divergence",
    "fisher_vector_product",
    "gauss_newton",
    "gauss_newton_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "influence",
    "kfac",
    "kl_divergence",
    "laplace",
    "mc_fisher",
    "mean_over_batches",
    "natural_gradient",
    "nystrom_preconditioner",
    "parameter_covariance",
    "scale_by_fisher",
    "scale_by_kfac",
    "score_fisher",
    "solve_dual",
    "stack_residuals",
    "standard_errors",
    "summary",
    "trace",
]

__version__ = "0.1.0"

warn_if_broken(jax.__version__)


def __getattr__(name: str) -> Any:
    # What stands on optional packages is imported when it is first used.
    if name in ("interop", "linen", "nnx"):
        return importlib.import_module(f"fvp.{name}")
    raise AttributeError(f"module 'fvp' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Not the folders, nor what this file imports.
    return sorted({*__all__, "__version__", "interop", "linen", "nnx"})
