"""Answers that one of two methods alone has right, as a line of the tests tells them."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.comparison import Test
from expunge.evaluation.stats import Interval


@dataclass(frozen=True)
class Answers:
    """McNemar's counts over all pairs of runs.

    Attributes:
        only_own, only_other: right with one method alone.
        n: answers that both gave.
        runs: pairs of runs.
        least, most: smallest and largest p of a pair.
        accuracy: of a single pair, the interval of the difference; with more, the test tells more.
    """

    only_own: int
    only_other: int
    n: int
    runs: int
    least: float
    most: float
    accuracy: Interval | None


def answers(test: Test) -> Answers | None:
    """The counts of a test; None where no questions were asked."""
    found = list(test.mcnemar.values())
    if not found:
        return None
    ps = [one.p for one in found]
    single = next(iter(test.accuracy.values()), None) if len(found) == 1 else None
    return Answers(
        sum(one.only_a for one in found),
        sum(one.only_b for one in found),
        sum(one.n for one in found),
        len(found),
        min(ps),
        max(ps),
        single,
    )
