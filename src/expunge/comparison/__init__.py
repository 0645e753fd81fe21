"""Objectives × functions × seeds: the matrix, its tests, its verdict, computed from run records."""

from expunge.comparison.cells import Cell, Place, cell_of, oracle_cell
from expunge.comparison.comparison import Comparison, Settings
from expunge.comparison.matrix import Row
from expunge.comparison.testing import Test
from expunge.comparison.verdict import Verdict

__all__ = [
    "Cell",
    "Comparison",
    "Place",
    "Row",
    "Settings",
    "Test",
    "Verdict",
    "cell_of",
    "oracle_cell",
]
