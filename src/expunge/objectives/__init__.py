"""Objectives: pure losses. Importing the package registers all of them."""

from expunge.objectives import misdirection, rerouting
from expunge.objectives.base import OBJECTIVES, Activations, Captured, Loss, objective, settings_of

__all__ = [
    "OBJECTIVES",
    "Activations",
    "Captured",
    "Loss",
    "misdirection",
    "objective",
    "rerouting",
    "settings_of",
]
