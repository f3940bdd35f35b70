"""Which training examples a prediction stands on."""

from fvp.attribution.influence import influence

__all__ = ["influence"]
