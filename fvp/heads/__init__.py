"""Output distributions: the first step of the library, which depends on nothing but numerics."""

from fvp.heads.gaussian import Gaussian
from fvp.heads.head import Head, NaturalHead
from fvp.heads.learned_scale_gaussian import LearnedScaleGaussian
from fvp.heads.root import Root
from fvp.heads.sigmoid import Sigmoid
from fvp.heads.softmax import Softmax

__all__ = [
    "Gaussian",
    "Head",
    "LearnedScaleGaussian",
    "NaturalHead",
    "Root",
    "Sigmoid",
    "Softmax",
]
