"""Output distributions: the first step of the library, which depends on nothing but numerics."""

from fvp.heads.exponential_family import ExponentialFamily
from fvp.heads.from_distribution import FromDistribution
from fvp.heads.gaussian import Gaussian
from fvp.heads.head import Head, NaturalHead
from fvp.heads.learned_scale_gaussian import LearnedScaleGaussian
from fvp.heads.multinomial import Multinomial
from fvp.heads.poisson import Poisson
from fvp.heads.product import Product
from fvp.heads.root import Root
from fvp.heads.sigmoid import Sigmoid
from fvp.heads.softmax import Softmax
from fvp.heads.student_t import StudentT

__all__ = [
    "ExponentialFamily",
    "FromDistribution",
    "Gaussian",
    "Head",
    "LearnedScaleGaussian",
    "Multinomial",
    "NaturalHead",
    "Poisson",
    "Product",
    "Root",
    "Sigmoid",
    "Softmax",
    "StudentT",
]
