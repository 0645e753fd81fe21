"""Differences between two methods that were run with the same seeds and asked the same examples.

Runs are a sample of seeds, questions a sample of questions: both are random, and they cross
(Clark 1973, doi:10.1016/S0022-5371(73)80014-3; Westfall, Kenny and Judd 2014,
doi:10.1037/xge0000014). With seeds s of S, examples q of Q in a set, d_sq what example q adds to
the difference with seed s, and D_s the difference itself:

    d_sq = mean + seed_s + example_q + rest_sq
    var(mean of D_s) = seed/S + Σ over sets (example/Q + rest/(S·Q))

The three variances come from mean squares, as in an analysis of variance with one observation a
cell; a negative one counts as 0. The critical value is Cochran's (Cochran and Cox 1950): Student's
quantiles for the degrees of freedom of each part, weighed by the parts' variances.

Deviations. From Clark's min F': D may be any smooth summary, such as a harmonic mean; its d_sq are
then the examples' influence values (delta method), and several sets may enter, each with examples
of its own. From the usual: Satterthwaite's degrees of freedom are told but not used; with them
as many as 8 % of true null hypotheses are rejected at three seeds and 12 % at two
(docs/methods.md), with Cochran's value about 5 % or less.

With one seed nothing is known of other seeds: the effect has no interval and no p of its own, only
a `Partial` one that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
LEAST = 1e-12  # differences and errors below it are rounding
LEAST_P = 1e-200
TAIL = 0.025
Over = Literal["examples", "seeds"]


@dataclass(frozen=True)
class Error:
    """The variance of an estimate, a sum of independent parts.

    Attributes:
        parts: (variance, degrees of freedom) of each.
    """

    parts: tuple[tuple[float, float], ...]

    @property
    def se(self) -> float:
        """Standard error."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom; without any variance, the fewest of a part."""
        uncertain = sum(variance**2 / df for variance, df in self.parts)
        return self.se**4 / uncertain if uncertain > 0 else min(df for _, df in self.parts)

    def cut(self, tail: float) -> float:
        """Standard errors beyond which an estimate lies with probability ``tail``: Cochran's."""
        total = self.se**2
        return sum(float(stats.t.isf(tail, df)) * part / total for part, df in self.parts if part)

    def tail(self, away: float) -> float:
        """The reverse: the probability beyond ``away`` standard errors."""
        if away < 0:
            return 1 - self.tail(-away)
        low, high = math.log(LEAST_P), math.log(0.5)
        if self.cut(LEAST_P) <= away:
            return LEAST_P
        if away == 0:
            return 0.5
        return math.exp(optimize.brentq(lambda x: self.cut(math.exp(x)) - away, low, high))


@dataclass(frozen=True)
class Partial:
    """What holds for other examples with these very seeds, or the reverse; never for both.

    Attributes:
        over: what was taken as a sample: ``examples`` or ``seeds``.
        ci_low, ci_high: 95 % interval.
        p: two-sided.
    """

    over: Over
    ci_low: float
    ci_high: float
    p: float


@dataclass(frozen=True)
class Components:
    """Variances behind an effect, from which its error at other sizes follows.

    Attributes:
        seed: between seeds, beyond what their examples explain.
        example, rest: of each set of examples: between examples, and of the two crossed.
        sizes: examples in each set.
    """

    seed: float
    example: tuple[float, ...]
    rest: tuple[float, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Effect:
    """A mean difference and how far it can be trusted. Any number is None where it is undefined.

    Attributes:
        mean: over seeds.
        ci_low, ci_high: 95 % interval, seeds and examples both taken as random.
        p: two-sided, of no difference; likewise.
        n_seeds, n_examples: behind it; examples of all sets together.
        df: Satterthwaite's degrees of freedom.
        error: the variance, from which the interval follows.
        partial: all that can be said where only one of the two was sampled.
        components: where seeds and examples were both sampled.
        reason: why numbers are missing.
    """

    mean: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    n_seeds: int = 0
    n_examples: int = 0
    df: float | None = None
    error: Error | None = None
    partial: Partial | None = None
    components: Components | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Moments:
    """Mean squares of one or of many crossed tables at once, in arrays of shape (...)."""

    mean: Floats
    between_seeds: Floats
    example: tuple[Floats, ...]
    rest: tuple[Floats, ...]
    seeds: int
    sizes: tuple[int, ...]

    @property
    def of_rest(self) -> Floats:
        """What the rest alone makes the variance between seeds."""
        crossed = [rest / size for rest, size in zip(self.rest, self.sizes, strict=True)]
        return np.sum(crossed, axis=0) if crossed else np.zeros_like(self.between_seeds)

    def parts(self) -> list[tuple[Floats, int]]:
        """What adds up to the variance of the mean, each (...) with its degrees of freedom."""
        found = []
        for example, rest, size in zip(self.example, self.rest, self.sizes, strict=True):
            # The examples' mean square holds the rest, which that of seeds holds already.
            net = example / size - rest / (self.seeds * size)
            found.append((np.maximum(net, 0.0), size - 1))
        # Answers of right and wrong may add up alike by chance, though the rest shows a variance.
        chance = self.between_seeds + sum(part for part, _ in found) <= LEAST**2
        of_seeds = np.where(chance, self.of_rest, self.between_seeds)
        return [(of_seeds / self.seeds, self.seeds - 1), *found]


def moments(differences: Floats, influences: Mapping[str, Floats]) -> Moments:
    """Mean squares of differences (..., S) and influences (..., S, Q); S ≥ 2, each Q ≥ 2."""
    seeds = differences.shape[-1]
    example, rest, sizes = [], [], []
    for d_SQ in influences.values():
        size = d_SQ.shape[-1]
        of_examples = d_SQ.mean(-2, keepdims=True)
        left = (
            d_SQ - of_examples - d_SQ.mean(-1, keepdims=True) + d_SQ.mean((-2, -1), keepdims=True)
        )
        example.append(of_examples[..., 0, :].var(-1, ddof=1))
        rest.append((left**2).sum((-2, -1)) / ((seeds - 1) * (size - 1)))
        sizes.append(size)
    return Moments(
        mean=differences.mean(-1),
        between_seeds=differences.var(-1, ddof=1),
        example=tuple(example),
        rest=tuple(rest),
        seeds=seeds,
        sizes=tuple(sizes),
    )


def effect(differences: ArrayLike, influences: Mapping[str, ArrayLike] | None = None) -> Effect:
    """The mean of a difference over seeds and examples, with interval and test.

    Args:
        differences: of shape (S,): the difference of the two summaries with each seed.
        influences: set of examples -> (S, Q): what each example adds to each difference, up to a
            constant for each seed. None: not known.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.
    """
    d_S = np.asarray(differences, dtype=float)
    tables = {name: np.asarray(d, dtype=float) for name, d in (influences or {}).items()}
    _check(d_S, tables)
    seeds, examples = len(d_S), sum(d.shape[1] for d in tables.values())
    if seeds == 0:
        return Effect(reason="no seed was run with both")
    mean = float(d_S.mean())
    found = Effect(mean=mean, n_seeds=seeds, n_examples=examples)
    # A set of one example tells nothing of others.
    telling = {name: d for name, d in tables.items() if d.shape[1] > 1}
    if seeds == 1:
        reason = "one seed: says nothing about others"
        error = Error(tuple(_of_mean(d[0]) for d in telling.values()))
        return replace(found, reason=reason, partial=_partial("examples", mean, error))
    if not telling:
        reason = "no values example by example: says nothing about other examples"
        error = Error((_of_mean(d_S),))
        return replace(found, reason=reason, partial=_partial("seeds", mean, error))
    squares = moments(d_S, telling)
    error = Error(tuple((float(part), df) for part, df in squares.parts()))
    if error.se <= LEAST < abs(mean):
        reason = "the same difference with every seed and example: no spread to test it against"
        return replace(found, reason=reason)
    low, high, p = _test(mean, error)
    return replace(
        found,
        ci_low=low,
        ci_high=high,
        p=p,
        df=error.df,
        error=error,
        components=_components(squares),
    )


def equivalence(found: Effect, margin: float) -> float | None:
    """p of two one-sided tests that the effect lies within ±``margin``; None where it has no error.

    Schuirmann 1987 (doi:10.1007/BF01068419). Below .05 the methods count as interchangeable.

    Raises:
        ValueError: the margin is not above 0.
    """
    sides = [below(found, margin), above(found, -margin)]
    return None if sides[0] is None or sides[1] is None else max(sides[0], sides[1])


def below(found: Effect, margin: float) -> float | None:
    """p of the one-sided test that the effect is below ``margin`` > 0; None without an error.

    Of the second method it says: not worse than the first by the margin.
    """
    if not margin > 0:
        raise ValueError(f"a margin above 0, not {margin}")
    if found.mean is None or found.error is None:
        return None
    if found.error.se <= LEAST:
        return 0.0 if found.mean < margin else 1.0
    return found.error.tail((margin - found.mean) / found.error.se)


def above(found: Effect, margin: float) -> float | None:
    """The reverse: p of the test that the effect is above ``margin`` < 0."""
    return below(replace(found, mean=None if found.mean is None else -found.mean), -margin)


def _components(found: Moments) -> Components:
    rest = tuple(float(one) for one in found.rest)
    return Components(
        seed=max(0.0, float(found.between_seeds - found.of_rest)),
        example=tuple(
            max(0.0, float(one) - left / found.seeds)
            for one, left in zip(found.example, rest, strict=True)
        ),
        rest=rest,
        sizes=found.sizes,
    )


def _of_mean(values: Floats) -> tuple[float, float]:
    """Variance of the mean, and its degrees of freedom."""
    return float(values.var(ddof=1)) / len(values), len(values) - 1.0


def _partial(over: Over, mean: float, error: Error) -> Partial | None:
    if not error.parts or error.se <= LEAST < abs(mean):
        return None
    return Partial(over, *_test(mean, error))


def _test(mean: float, error: Error) -> tuple[float, float, float]:
    """95 % interval and two-sided p. Nothing but equal values: p 1."""
    if error.se <= LEAST:
        return mean, mean, 1.0
    half = error.cut(TAIL) * error.se
    return mean - half, mean + half, 2 * error.tail(abs(mean) / error.se)


def _check(d_S: Floats, tables: Mapping[str, Floats]) -> None:
    if d_S.ndim != 1:
        raise ValueError(f"differences of shape (S,), not {d_S.shape}")
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[0] != len(d_S):
            raise ValueError(f"{name}: influences of shape ({len(d_S)}, Q), not {table.shape}")
        if not np.isfinite(table).all():
            raise ValueError(f"{name}: influences that are not finite")
    if not np.isfinite(d_S).all():
        raise ValueError("differences that are not finite")
