"""Gaussian posteriors of the parameters, around a minimum of the loss."""

from fvp.posteriors.laplace import laplace
from fvp.posteriors.posterior import Posterior

__all__ = ["Posterior", "laplace"]
