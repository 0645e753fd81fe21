"""McNemar, the paired bootstrap and Holm agree with other tools, and with sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from expunge.evaluation.paired import holm, mcnemar, paired_bootstrap


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (3, 9), (12, 12), (40, 21), (1, 0)])
def test_mcnemar_agrees_with_statsmodels(only_a: int, only_b: int) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * 7
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * 7
    found = mcnemar(a, b)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[7, only_a], [only_b, 0]], exact=True).pvalue
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, only_a + only_b + 7)
    assert found.p == pytest.approx(expected)
    assert found.mid_p <= found.p
    swapped = mcnemar(b, a)
    assert (swapped.only_a, swapped.p, swapped.mid_p) == (only_b, found.p, found.mid_p)


def test_mcnemar_by_hand() -> None:
    """Of 4 questions that differ one goes the other way: 2·(1 + 4)/16; mid-p less 4/16."""
    found = mcnemar([1, 1, 1, 0, 1, None, 0.5], [0, 0, 0, 1, 1, 1, 0])
    assert (found.only_a, found.only_b, found.n) == (3, 1, 6)
    assert (found.p, found.mid_p) == pytest.approx((10 / 16, 6 / 16))


def test_mcnemar_of_equal_answers_is_1() -> None:
    assert mcnemar([1, 0], [1, 0]).p == mcnemar([], []).p == 1
    assert mcnemar([1, 0], [1, 0]).mid_p == 1
    with pytest.raises(ValueError):
        mcnemar([1, 0], [1])


def test_mcnemar_holds_its_level() -> None:
    """Exact is timid, mid-p less so; 40 questions that differ on the average."""
    generator = np.random.default_rng(0)
    differ = generator.binomial(200, 0.2, 2000)
    only_a = generator.binomial(differ, 0.5)
    found = [
        mcnemar([1.0] * a + [0.0] * (n - a), [0.0] * a + [1.0] * (n - a))
        for a, n in zip(only_a.tolist(), differ.tolist(), strict=True)
    ]
    exact, middle = (
        np.mean([getattr(one, kind) < 0.05 for one in found]) for kind in ("p", "mid_p")
    )
    assert 0.02 <= exact <= middle <= 0.065


def test_paired_bootstrap_covers_and_cancels_what_is_shared() -> None:
    generator = np.random.default_rng(1)
    covered, widths = [], []
    for _ in range(500):
        shared = generator.normal(0, 5, 60)
        a, b = shared + generator.normal(0.3, 1, 60), shared + generator.normal(0, 1, 60)
        low, high = paired_bootstrap(a, b)
        covered.append(low <= 0.3 <= high)
        widths.append(high - low)
    assert np.mean(covered) >= 0.92
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(2 / 60), rel=0.1)


def test_paired_bootstrap_with_weights_and_bad_input() -> None:
    values = np.array([1.0, 2.0, 4.0])
    assert paired_bootstrap(values, values) == (0, 0)
    low, high = paired_bootstrap(values, np.zeros(3), [1, 0, 0])
    assert low == high == 1  # all the weight is on one example
    for a, b in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="two or more"):
            paired_bootstrap(a, b)


def test_holm_agrees_with_statsmodels() -> None:
    ps = np.random.default_rng(2).random(12) ** 3
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert holm(ps.tolist()) == pytest.approx(multitest.multipletests(ps, method="holm")[1])


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_holm_holds_the_level_of_the_family() -> None:
    generator = np.random.default_rng(3)
    ps = stats.norm.sf(np.abs(generator.normal(size=(2000, 8)))) * 2
    wrong = np.mean([min(holm(row.tolist())) < 0.05 for row in ps])  # type: ignore[type-var]
    assert 0.035 <= wrong <= 0.065
