"""From one value per example to a score with a 95 % interval, and from seeds to their spread.

Intervals: Wilson (1927) for fractions; for weighted means the expanded percentile bootstrap
(Hesterberg 2015, arXiv:1411.5279, section 5.3.3), whose quantiles move out for small samples as
Student's t does against the normal. Missing stays missing: nothing here turns it into 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from expunge.evaluation.examples import Examples
from expunge.records import ModelRole, Score, Split, Values

DRAWS = 2000
BLOCK = 1 << 20  # resampled indices held at once: 8 MB
TAIL = 0.025  # outside a 95 % interval, on each side

Interval = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """Mean of a number over seeds, its standard deviation and Student's 95 % interval.

    ``mean`` is None without values; ``sd`` and the interval are None with fewer than two.
    """

    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


def to_score(examples: Examples, *, model: ModelRole, split: Split) -> Score:
    """The weighted mean of ``examples`` with its 95 % interval over examples.

    fraction: Wilson on the weighted sum of the values. Values between 0 and 1 (ties) vary less than
        0s and 1s of the same mean, so the interval is then a little too wide, never too narrow.
    nats/token: token-weighted mean, bootstrap over examples. One example has no spread: value
        without interval.
    perplexity: exp of that mean and of its interval.

    No examples, or a perplexity beyond floating point: value None with a reason.
    """
    value: float | None = None
    interval: tuple[float | None, float | None] = (None, None)
    reason = examples.reason or "no examples"
    if examples.values:
        values, weights = np.array(examples.values), np.array(examples.weights, dtype=float)
        value = _weighted_mean(values, weights)
        if examples.unit == "fraction":
            # Kish's effective size: n where the weights are equal.
            interval = wilson(value, float(weights.sum() ** 2 / (weights**2).sum()))
        elif len(values) > 1:
            interval = bootstrap(values, weights)
        if examples.unit == "perplexity":
            reason = f"exp({value:.0f} nats/token) is beyond floating point"
            value = _exp(value)
            interval = (_exp(interval[0]), _exp(interval[1])) if value else (None, None)
    return Score(
        name=examples.name,
        model=model,
        split=split,
        value=value,
        ci_low=interval[0],
        ci_high=interval[1],
        n=len(examples.values),
        higher_is=examples.higher_is,
        unit=examples.unit,
        chance=examples.chance,
        reason=reason if value is None else None,
        scorer=examples.scorer,
        prompts=examples.prompts,
    )


def to_values(examples: Examples, *, model: ModelRole, split: Split) -> Values:
    """The values as a record keeps them, with None where an example was not scored."""
    places = examples.places or tuple(range(len(examples.values)))
    values: list[float | None] = [None] * (len(examples.values) + examples.skipped)
    weights = [0.0] * len(values)
    for place, value, weight in zip(places, examples.values, examples.weights, strict=True):
        values[place], weights[place] = float(f"{value:.6g}"), float(weight)
    return Values(
        name=examples.name,
        model=model,
        split=split,
        values=values,
        weights=None if set(examples.weights) <= {1.0} else weights,
        unit=examples.unit,
        scorer=examples.scorer,
        prompts=examples.prompts,
    )


def wilson(fraction: float, n: float) -> Interval:
    """Wilson's 95 % interval of a fraction seen in ``n`` examples."""
    z2 = float(ndtri(1 - TAIL)) ** 2
    centre = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (fraction * (1 - fraction) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not push 0 of n below 0, or the value outside its own interval.
    return min(max(0.0, centre - half), fraction), max(min(1.0, centre + half), fraction)


def bootstrap(
    values: NDArray[np.float64], weights: NDArray[np.float64], *, seed: int = 0
) -> Interval:
    """95 % interval of the weighted mean over two or more examples, from 2,000 resamplings.

    The same ``seed`` and number of examples give the same resamplings, so models measured on the
    same examples are resampled alike. Below about 20 skewed examples it covers less than it says.
    """
    return percentiles(resampled(values, weights, seed=seed), len(values))


def resampled(
    values: NDArray[np.float64], weights: NDArray[np.float64], *, seed: int = 0
) -> NDArray[np.float64]:
    """The weighted means of 2,000 resamplings of the examples; NaN where no weight was drawn."""
    n = len(values)
    generator = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    block = max(1, BLOCK // n)
    for start in range(0, DRAWS, block):
        drawn = generator.integers(0, n, (min(block, DRAWS - start), n))
        with np.errstate(invalid="ignore"):
            means.append((weights * values)[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(means)


def percentiles(draws: NDArray[np.float64], n: int) -> Interval:
    """The expanded percentile interval of resampled numbers that rest on ``n`` ≥ 2 examples."""
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, TAIL))
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and t-interval of one number over seeds."""
    n = len(values)
    if n == 0:
        return Spread(None, None, None, None, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Spread(mean, None, None, None, 1)
    sd = float(np.std(values, ddof=1))
    half = -float(stdtrit(n - 1, TAIL)) * sd / math.sqrt(n)
    return Spread(mean, sd, mean - half, mean + half, n)


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float((values * weights).sum() / weights.sum())


def _exp(nats: float | None) -> float | None:
    """exp, or None where there is no number or it would not fit a float."""
    return None if nats is None or nats > math.log(np.finfo(float).max) else math.exp(nats)
