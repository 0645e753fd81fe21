"""Hyperplanes and intervals against hand-made numbers and the libraries' own pipelines."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from expunge.evaluation.stats import wilson
from expunge.probes import linear
from expunge.probes.linear import Plane


def gaussians(
    n: int = 600, *, seed: int = 0, width: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two unit Gaussians 3 apart along a known unit direction around (5, …, 5)."""
    generator = np.random.default_rng(seed)
    direction_D = generator.normal(size=width)
    direction_D /= np.linalg.norm(direction_D)
    labels_S = np.arange(n) % 2 == 1
    rows_SD = generator.normal(size=(n, width)) + 5
    rows_SD += np.where(labels_S, 1.5, -1.5)[:, None] * direction_D
    return rows_SD.astype(np.float32), labels_S, direction_D


def by_means(rows_SD: np.ndarray, labels_S: np.ndarray) -> Plane:
    return linear.mean_difference(rows_SD[~labels_S].mean(0), rows_SD[labels_S].mean(0))


FITS = [by_means, linear.logistic, linear.discriminant]


@pytest.mark.parametrize("fit", FITS)
def test_finds_the_known_direction(fit: Callable[..., Plane]) -> None:
    rows_SD, labels_S, direction_D = gaussians()
    plane = fit(rows_SD, labels_S)
    assert np.linalg.norm(plane.weight_D) == pytest.approx(1)
    assert plane.weight_D @ direction_D > 0.98  # the toxic side is positive
    # The best cut lies midway, at (5, …, 5).
    assert plane.bias == pytest.approx(-5 * plane.weight_D.sum(), abs=0.15)
    # Bayes' accuracy is Φ(1.5) = 0.933, and the AUROC Φ(3/√2) = 0.983.
    fresh_SD, fresh_S, _ = gaussians(4000, seed=0)
    assert linear.accuracy(plane.scores(fresh_SD), fresh_S) == pytest.approx(0.933, abs=0.015)
    assert linear.auroc(plane.scores(fresh_SD), fresh_S) == pytest.approx(0.983, abs=0.01)


@pytest.mark.parametrize("fit", FITS)
def test_turns_round_with_the_labels(fit: Callable[..., Plane]) -> None:
    rows_SD, labels_S, _ = gaussians()
    one, other = fit(rows_SD, labels_S), fit(rows_SD, ~labels_S)
    np.testing.assert_allclose(one.weight_D, -other.weight_D, atol=1e-3)
    assert one.bias == pytest.approx(-other.bias, abs=1e-2)


@pytest.mark.parametrize("fit", FITS)
def test_the_larger_class_does_not_pull_the_cut(fit: Callable[..., Plane]) -> None:
    rows_SD, labels_S, _ = gaussians(4000)
    few = ~labels_S | (np.arange(4000) % 20 == 1)  # ten neutral rows for a toxic one
    fair, skewed = fit(rows_SD, labels_S), fit(rows_SD[few], labels_S[few])
    assert skewed.bias == pytest.approx(fair.bias, abs=0.6)
    assert linear.accuracy(skewed.scores(rows_SD), labels_S) > 0.92


def test_mean_difference_by_hand() -> None:
    plane = linear.mean_difference(np.array([1.0, 1.0]), np.array([4.0, 5.0]))
    np.testing.assert_allclose(plane.weight_D, [0.6, 0.8])
    # Midway is (2.5, 3): 0.6 · 2.5 + 0.8 · 3 = 3.9.
    assert plane.bias == pytest.approx(-3.9)
    np.testing.assert_allclose(plane.scores(np.array([[4.0, 5.0], [1.0, 1.0]])), [2.5, -2.5])


def test_no_difference_gives_no_direction() -> None:
    same = np.ones(3)
    assert not linear.mean_difference(same, same).weight_D.any()


def test_scaling_is_folded_back() -> None:
    """Huge and constant dimensions, as residual streams have them, change nothing."""
    rows_SD, labels_S, _ = gaussians()
    rows_SD[:, 0] *= 1e4
    rows_SD[:, 1] = 7
    plane = linear.logistic(rows_SD, labels_S)
    wide_SD = rows_SD.astype(np.float64)
    within_D = np.sqrt((wide_SD[labels_S].var(0) + wide_SD[~labels_S].var(0)) / 2)
    scaled_SD = wide_SD / np.where(within_D > 0, within_D, 1)
    scaled_SD -= scaled_SD.mean(0)
    model = LogisticRegression(C=linear.INVERSE_RIDGE, class_weight="balanced")
    expected_S = model.fit(scaled_SD, labels_S).decision_function(scaled_SD)
    found_S = plane.scores(wide_SD)
    ratio = expected_S.std() / found_S.std()
    np.testing.assert_allclose(found_S * ratio, expected_S, atol=2e-2)


def test_a_wide_gap_does_not_turn_the_direction() -> None:
    rows_SD, labels_S, direction_D = gaussians()
    rows_SD += (np.where(labels_S, 20, -20)[:, None] * direction_D).astype(np.float32)
    assert linear.logistic(rows_SD, labels_S).weight_D @ direction_D > 0.99


def test_accuracy_and_auroc_by_hand() -> None:
    scores, labels = np.array([-1.0, 2.0, 1.0, 2.0]), np.array([False, False, True, True])
    assert linear.accuracy(scores, labels) == 0.75
    # Pairs toxic against neutral: 1 > -1, 1 < 2, 2 > -1, 2 = 2 (half).
    assert linear.auroc(scores, labels) == 2.5 / 4


@pytest.mark.parametrize(("value", "n"), [(0.0, 10), (0.5, 10), (0.9, 50), (1.0, 7), (1 / 3, 3)])
def test_accuracy_interval_is_wilsons(value: float, n: int) -> None:
    assert linear.accuracy_interval(value, n) == pytest.approx(wilson(value, n), abs=1e-8)


def test_auroc_interval_by_hand() -> None:
    low, high = linear.auroc_interval(0.8, 30, 20)
    for bound in (low, high):
        first, second = bound / (2 - bound), 2 * bound**2 / (1 + bound)
        # Hanley and McNeil's variance with (30 + 20) / 2 in place of either size.
        variance = bound * (1 - bound) + 24 * (first - bound**2) + 24 * (second - bound**2)
        assert abs(0.8 - bound) == pytest.approx(1.959964 * (variance / 600) ** 0.5, rel=1e-5)
    assert low < 0.8 < high


def test_auroc_interval_keeps_a_width_at_the_ends() -> None:
    low, high = linear.auroc_interval(1.0, 10, 10)
    assert 0.6 < low < 0.9 and high == 1
    mirrored = linear.auroc_interval(0.0, 10, 10)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_auroc_interval_covers() -> None:
    generator, covered = np.random.default_rng(0), 0
    labels_S = np.arange(60) >= 30
    for _ in range(400):
        scores_S = generator.normal(size=60) + 1.19 * labels_S  # true AUROC Φ(1.19/√2) = 0.8
        low, high = linear.auroc_interval(linear.auroc(scores_S, labels_S), 30, 30)
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.99
