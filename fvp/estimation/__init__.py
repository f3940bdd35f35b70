"""What products alone tell of operators: traces, largest eigenvalues, how far two are apart."""

from fvp.estimation.comparison import CurvatureComparison, compare_curvatures
from fvp.estimation.eigenpairs import eigenpairs
from fvp.estimation.trace import trace

__all__ = ["CurvatureComparison", "compare_curvatures", "eigenpairs", "trace"]
