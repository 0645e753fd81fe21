"""Two models on the same examples: counts and intervals of one run; correction for many tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from expunge.evaluation.stats import Interval, percentiles, resampled


@dataclass(frozen=True)
class McNemar:
    """Questions on which two models differ.

    Attributes:
        only_a, only_b: questions that one of them alone has right.
        n: questions that both were asked.
        p: exact, two-sided: the questions that differ are split as a fair coin would.
        mid_p: less conservative; half of the probability of the very counts is left out.
    """

    only_a: int
    only_b: int
    n: int
    p: float
    mid_p: float


def mcnemar(a: Sequence[float | None], b: Sequence[float | None]) -> McNemar:
    """McNemar's exact test (1947), and mid-p (Fagerland et al. 2013, doi:10.1186/1471-2288-13-91).

    A value above .5 is right, so a tie for the best choice counts as wrong. Questions that either
    model was not scored on are left out. It treats questions as the only source of chance: its p
    is that of one pair of runs.

    Raises:
        ValueError: other questions, by their number.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    only_a = sum(x > 0.5 >= y for x, y in pairs)
    only_b = sum(y > 0.5 >= x for x, y in pairs)
    differ, fewer = only_a + only_b, min(only_a, only_b)
    exact = min(1.0, 2 * float(stats.binom.cdf(fewer, differ, 0.5)))
    middle = 2 * float(stats.binom.cdf(fewer, differ, 0.5)) - float(
        stats.binom.pmf(fewer, differ, 0.5)
    )
    return McNemar(only_a, only_b, len(pairs), exact, min(1.0, middle))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0
) -> Interval:
    """95 % interval of the difference of two weighted means over the same n ≥ 2 examples.

    Examples are drawn for both at once, so what they share cancels (`stats.resampled`).

    Raises:
        ValueError: unlike shapes, or fewer than two examples.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    shares = np.ones_like(first) if weights is None else np.asarray(weights, dtype=float)
    if first.ndim != 1 or not first.shape == second.shape == shares.shape or len(first) < 2:
        raise ValueError(
            f"two or more values of the same examples, not {first.shape}, {second.shape}"
        )
    return percentiles(resampled(first - second, shares, seed=seed), len(first))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979), in their order.

    None, a test that could not be made, stays None and does not count.
    """
    made = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        adjusted[place] = largest
    return adjusted
