"""Language functions. Importing the package registers all of them."""

from expunge.functions import knowledge, toxicity
from expunge.functions.base import FUNCTIONS

__all__ = ["FUNCTIONS", "knowledge", "toxicity"]
