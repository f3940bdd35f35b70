"""Statistics: what curvature says about estimates, about densities and about their scores."""

from fvp.statistics.covariance import parameter_covariance, standard_errors
from fvp.statistics.delta_method import Estimate, delta_method
from fvp.statistics.divergence import kl_divergence
from fvp.statistics.elastic_weights import ewc_penalty
from fvp.statistics.score_matching import fisher_divergence
from fvp.statistics.scores import density_fisher, score_fisher
from fvp.statistics.summary import Summary, confidence_intervals, summary

__all__ = [
    "Estimate",
    "Summary",
    "confidence_intervals",
    "delta_method",
    "density_fisher",
    "ewc_penalty",
    "fisher_divergence",
    "kl_divergence",
    "parameter_covariance",
    "score_fisher",
    "standard_errors",
    "summary",
]
