"""Random search: the first trial keeps the usual values, the others are drawn from the ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.metalearning.searching import HIGH, LOW, constant, trial
from expunge.objectives.base import Knob
from expunge.training.tradeoff import START, Learned, Scale, State, scales_of

AT_START, LATER = State(0.0, START, 0), State(0.5, START, 3)
OWN = (Knob("margin", 0.0, 4.0, scale="linear"), Knob("beta", 0.01, 2.0))
USUAL = {"lr": 1e-3, "retain_weight": 5.0, "margin": 4.0, "beta": 0.05}
SCALES = scales_of(OWN, USUAL)


def knobs(seed: int, number: int, scales: tuple[Scale, ...] = SCALES) -> dict[str, float]:
    """What a run would set at its first step."""
    rule = Learned(scales, trial(scales, seed, number), every=8, retain_weight=1.0)
    return dict(rule.at(0, 40, {}).knobs)


def test_the_first_keeps_the_usual_values_even_at_the_end_of_a_range() -> None:
    """A margin of 4 lies at the end of its range, where a policy would not begin."""
    assert knobs(0, 0) == pytest.approx(USUAL)
    assert [scale.start_share for scale in SCALES][2] == 0.9


@given(lr=st.floats(1e-6, 1.0), margin=st.floats(-1.0, 9.0), beta=st.floats(1e-4, 50.0))
def test_what_was_chosen_is_what_a_run_around_it_keeps_to(
    lr: float, margin: float, beta: float
) -> None:
    """Settings of a choice become the usual values of the seeds, wherever in the range they lie."""
    usual = {"lr": lr, "retain_weight": 2.0, "margin": margin, "beta": beta}
    found = knobs(3, 0, scales_of(OWN, usual))
    assert found == pytest.approx(usual, rel=1e-6, abs=1e-9)


def test_trials_differ_and_depend_on_seed_and_number_alone() -> None:
    seen = [tuple(knobs(seed, number).values()) for seed in (0, 1) for number in range(4)]
    assert len(set(seen)) == 7  # the first of either seed is the same
    assert knobs(1, 3) == knobs(1, 3)


def test_a_trial_holds_its_knobs() -> None:
    actor = trial(SCALES, 0, 2)
    assert np.array_equal(actor(AT_START), actor(LATER))


def test_shares_by_hand() -> None:
    """Halfway: the middle of a linear range, the geometric mean of the ends of a wide one."""
    places = constant(SCALES, {"lr": 0.5, "retain_weight": 0.5, "margin": 0.5, "beta": 0.5})(LATER)
    values = [s.value(float(p)) for s, p in zip(SCALES, places, strict=True)]
    assert values == pytest.approx([1e-3, 5.0, 2.0, (0.01 * 2.0) ** 0.5])


def test_draws_cover_the_ranges_and_stay_within() -> None:
    drawn = np.array([list(knobs(0, number).values()) for number in range(1, 200)])
    for column, scale in zip(drawn.T, SCALES, strict=True):
        ends = [scale.at_share(share) for share in (LOW, 0.1, 0.9, HIGH)]
        assert ends[0] <= column.min() < ends[1] and ends[2] < column.max() <= ends[3]
