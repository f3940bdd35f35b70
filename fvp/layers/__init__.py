"""One capture of a model's layers: inputs and back-propagated columns of every parameter's use."""

from fvp.layers.diagonal import fisher_diagonal
from fvp.layers.kfac import KFAC, KFACInverse, kfac
from fvp.layers.report import Coverage

__all__ = ["KFAC", "Coverage", "KFACInverse", "fisher_diagonal", "kfac"]
