"""Intervals cover what they say; nothing missing becomes a zero."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats as scipy_stats

from expunge.evaluation.examples import Examples, Unit, collect, missing
from expunge.evaluation.stats import bootstrap, mean_and_spread, to_score, wilson


def examples(values: list[float], weights: list[float] | None = None, unit: Unit = "fraction"):  # type: ignore[no-untyped-def]
    weights = weights or [1.0] * len(values)
    return Examples("x", tuple(values), tuple(weights), unit, "better", chance=0.25)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (137, 200)])
def test_wilson_agrees_with_scipy(hits: int, n: int) -> None:
    score = to_score(examples([1.0] * hits + [0.0] * (n - hits)), model="base", split="test")
    expected = scipy_stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert score.value == hits / n and score.n == n and score.chance == 0.25
    assert (score.ci_low, score.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert score.ci_low <= score.value <= score.ci_high


@pytest.mark.parametrize("p", [0.05, 0.3, 0.68, 0.95])
def test_wilson_covers(p: float) -> None:
    hits = np.random.default_rng(0).binomial(200, p, 2000)
    intervals = {k: wilson(k / 200, 200) for k in set(hits.tolist())}
    assert np.mean([intervals[k][0] <= p <= intervals[k][1] for k in hits.tolist()]) >= 0.93


@pytest.mark.parametrize("n", [20, 60])
def test_bootstrap_covers(n: int) -> None:
    """Gamma values (skew 1) and token weights, as answers' nats/token are."""
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(2000):
        values, weights = generator.gamma(4.0, 0.5, n), generator.integers(5, 20, n).astype(float)
        low, high = bootstrap(values, weights)
        covered.append(low <= 2.0 <= high)
    assert np.mean(covered) >= 0.93


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, 100)
    low, high = bootstrap(values, np.ones(100))
    other = scipy_stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    expected = other.confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_bootstrap_is_repeatable_fast_and_blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = np.random.default_rng(3).random((2, 400))
    first = bootstrap(values, weights)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        assert bootstrap(values, weights) == first
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.06  # 10 ms on an idle core; the bound leaves room for a busy one
    monkeypatch.setattr("expunge.evaluation.stats.BLOCK", 400 * 7)
    assert bootstrap(values, weights) == pytest.approx(first, rel=1e-9)


def test_weighted_mean_by_hand() -> None:
    score = to_score(examples([1.0, 4.0], [3.0, 1.0], "nats/token"), model="base", split="test")
    assert score.value == pytest.approx(7 / 4)
    assert score.ci_low is not None and 1.0 <= score.ci_low <= 7 / 4 <= score.ci_high <= 4.0  # type: ignore[operator]


def test_perplexity_is_the_exponential() -> None:
    nats = to_score(examples([1.0, 2.0, 4.0], unit="nats/token"), model="base", split="test")
    ppl = to_score(examples([1.0, 2.0, 4.0], unit="perplexity"), model="base", split="test")
    assert ppl.value == pytest.approx(math.exp(7 / 3))
    assert ppl.ci_high == pytest.approx(math.exp(nats.ci_high))  # type: ignore[arg-type]
    huge = to_score(examples([1e4, 1e4], unit="perplexity"), model="base", split="test")
    assert huge.value is None and huge.ci_low is None and "floating point" in str(huge.reason)
    json.dumps(asdict(huge), allow_nan=False)


def test_ties_are_wilson_on_the_sum() -> None:
    score = to_score(examples([1.0, 0.5, 0.5, 0.0]), model="base", split="test")
    assert score.value == 0.5
    assert (score.ci_low, score.ci_high) == pytest.approx(wilson(0.5, 4))


def test_one_example_has_no_bootstrap_interval() -> None:
    score = to_score(examples([2.0], unit="nats/token"), model="base", split="test")
    assert (score.value, score.ci_low, score.ci_high, score.n) == (2.0, None, None, 1)


def test_missing_is_not_zero() -> None:
    none = missing("x", unit="fraction", higher_is="better", reason="no questions")
    score = to_score(none, model="base", split="test")
    assert (score.value, score.ci_low, score.ci_high, score.n) == (None, None, None, 0)
    assert score.reason == "no questions"
    pairs = [(1.0, 1.0), None, (float("nan"), 2.0), (float("inf"), 1.0)]
    some = collect("x", pairs, unit="nats/token", higher_is="worse", reason="why")
    assert (some.values, some.skipped) == ((1.0,), 3)
    assert some.reason == "3 of 4 skipped: why"
    assert to_score(some, model="base", split="test").reason is None


def test_mean_and_spread() -> None:
    spread = mean_and_spread([1.0, 2.0, 4.0])
    expected = scipy_stats.t.interval(0.95, 2, loc=7 / 3, scale=scipy_stats.sem([1.0, 2.0, 4.0]))
    assert (spread.mean, spread.sd) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert (spread.ci_low, spread.ci_high) == pytest.approx(expected)
    assert mean_and_spread([]).mean is None
    one = mean_and_spread([5.0])
    assert (one.mean, one.sd, one.ci_low, one.n) == (5.0, None, None, 1)
