"""What is computed on one capture of a model: Fisher diagonal, Kronecker factors, Gram matrix.

Imports `fvp.tracing`, which finds the uses of the parameters, and the columns of a curvature
in the space of outputs; never solvers or transformations.
"""

from fvp.layers.diagonal import fisher_diagonal
from fvp.layers.kfac import kfac
from fvp.layers.kfac_operator import KFAC, KFACInverse
from fvp.tracing.coverage import Coverage

__all__ = ["KFAC", "Coverage", "KFACInverse", "fisher_diagonal", "kfac"]
