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
from fvp.estimation import eigenpairs, trace
from fvp.heads import Gaussian, Head, LearnedScaleGaussian, NaturalHead, Root, Sigmoid, Softmax
from fvp.layers import KFAC, Coverage, KFACInverse, fisher_diagonal, kfac
from fvp.posteriors import Posterior, laplace
from fvp.preconditioners import (
    Jacobi,
    Preconditioner,
    diagonal_preconditioner,
    nystrom_preconditioner,
)
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
from fvp.transforms import (
    NaturalGradientState,
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
    "CurvatureOperator",
    "DampedCurvature",
    "DampedSolver",
    "DampedSystem",
    "DampingRule",
    "DatasetOperator",
    "Dense",
    "Dual",
    "EmpiricalCurvature",
    "FisherCurvature",
    "FixedDamping",
    "Gaussian",
    "Head",
    "HessianCurvature",
    "Jacobi",
    "KFACInverse",
    "KFACSolver",
    "KFACState",
    "LearnedScaleGaussian",
    "LevenbergMarquardt",
    "NaturalGradientState",
    "NaturalHead",
    "Observation",
    "OutputCurvature",
    "Posterior",
    "Preconditioner",
    "Problem",
    "ReductionRatio",
    "Root",
    "SampledCurvature",
    "Sigmoid",
    "Softmax",
    "cg",
    "dataset_operator",
    "diagonal_preconditioner",
    "eigenpairs",
    "empirical_fisher",
    "empirical_fisher_vector_product",
    "fisher",
    "fisher_diagonal",
    "fisher_vector_product",
    "gauss_newton",
    "gauss_newton_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "influence",
    "kfac",
    "laplace",
    "mc_fisher",
    "mean_over_batches",
    "natural_gradient",
    "nystrom_preconditioner",
    "scale_by_fisher",
    "scale_by_kfac",
    "solve_dual",
    "trace",
]

__version__ = "0.1.0"

warn_if_broken(jax.__version__)


def __getattr__(name: str) -> Any:
    # What stands on optional packages is imported when it is first used.
    if name in ("interop", "linen", "nnx"):
        return importlib.import_module(f"fvp.{name}")
    raise AttributeError(f"module 'fvp' has no attribute {name!r}")
