"""`expunge compare`: what a comparison runs, and the running of it."""

from expunge.compare.plan import ComparisonPlan, miniature_plan
from expunge.compare.rounds import COMPARISON_NAME, Comparing

__all__ = ["COMPARISON_NAME", "Comparing", "ComparisonPlan", "miniature_plan"]
