"""How many seeds, or examples, an effect of the size that was seen would need to be decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

from expunge.evaluation.significance import LEAST, Components, Effect, Error

MOST_SEEDS, MOST_TIMES = 200, 100  # how far to look


@dataclass(frozen=True)
class Needed:
    """What would decide an effect of the size that was seen, with the spread that was seen.

    Attributes:
        seeds: with these examples; None: MOST_SEEDS would not be enough.
        examples: with these seeds, all sets growing alike; None: MOST_TIMES as many would not be.
    """

    seeds: int | None
    examples: int | None


def needed(
    found: Effect, *, alpha: float = 0.05, power: float = 0.8, margin: float | None = None
) -> Needed | None:
    """Seeds, or examples, with which a true effect of this size would be significant.

    By the noncentral t distribution, with the components as they were estimated; those of a few
    seeds are rough, and the effect that was seen may flatter, so this is a rough guide.

    Args:
        alpha: level that one test must reach, the correction included.
        power: probability of reaching it.
        margin: show equivalence within it instead (`equivalence`).

    Returns:
        None where there are no components, or nothing to show: no effect, or one beyond the margin.
    """
    parts, mean = found.components, found.mean
    if parts is None or mean is None:
        return None
    if abs(mean) <= LEAST if margin is None else abs(mean) >= margin:
        return None

    def enough(seeds: int, times: int) -> bool:
        error = _projected(parts, seeds, tuple(times * size for size in parts.sizes))
        if margin is None:
            return _power(abs(mean), error, alpha / 2) >= power
        # Either one-sided test may fail; both failing at once is counted twice.
        sides = [_power(margin + sign * mean, error, alpha) for sign in (1, -1)]
        return sum(sides) - 1 >= power

    seeds = _first(lambda s: enough(s, 1), 2, MOST_SEEDS)
    times = _first(lambda t: enough(found.n_seeds, t), 1, MOST_TIMES)
    return Needed(seeds, None if times is None else times * sum(parts.sizes))


def _power(mean: float, error: Error, tail: float) -> float:
    """Probability that an estimate of ``mean`` > 0 lies beyond the critical value above 0."""
    if error.se <= LEAST:
        return 1.0
    away, cut = mean / error.se, error.cut(tail)
    # Far out the noncentral t has no accurate tail, and needs none.
    return 1.0 if away > 20 * cut else float(stats.nct.sf(cut, error.df, away))


def _projected(parts: Components, seeds: int, sizes: tuple[int, ...]) -> Error:
    """The error to be expected with other sizes."""
    shared = sum(rest / size for rest, size in zip(parts.rest, sizes, strict=True))
    own = [(one / size, size - 1) for one, size in zip(parts.example, sizes, strict=True)]
    return Error((((parts.seed + shared) / seeds, seeds - 1), *own))


def _first(fits: Callable[[int], bool], low: int, most: int) -> int | None:
    """The smallest number that fits, by doubling, then halving; None if none is found."""
    high = low
    while not fits(high):
        if high == most:
            return None
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
