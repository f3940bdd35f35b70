"""Output distributions: the first step of the library, which depends on nothing but numerics."""

from fvp.heads.gaussian import Gaussian
from fvp.heads.head import Head
from fvp.heads.sigmoid import Sigmoid
from fvp.heads.softmax import Softmax

__all__ = ["Gaussian", "Head", "Sigmoid", "Softmax"]
