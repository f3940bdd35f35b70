"""Step control: how far along the direction, and how much damping next time.

The direction comes in as one small record of numbers (`fvp.control.record.Step`), so that
nothing here knows how it was found.
"""

from fvp.control.fixed import FixedDamping
from fvp.control.levenberg_marquardt import LevenbergMarquardt
from fvp.control.record import Outcome, Step
from fvp.control.reduction_ratio import ReductionRatio
from fvp.control.rule import DampingRule, Observation
from fvp.control.searched import SearchedDamping

__all__ = [
    "DampingRule",
    "FixedDamping",
    "LevenbergMarquardt",
    "Observation",
    "Outcome",
    "ReductionRatio",
    "SearchedDamping",
    "Step",
]
