"""The trade-off: knobs stay in their ranges, are asked for when they should be, and are obeyed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from expunge.objectives import OBJECTIVES
from expunge.objectives.base import Knob
from expunge.training.loop import TrainingResult
from expunge.training.tradeoff import (
    COMMON_KNOBS,
    START,
    Dials,
    Learned,
    Scale,
    State,
    scales_of,
)
from expunge.training.watch import Point, Watch

ABSOLUTE = Knob("beta", 1.0, 20.0)
LINEAR = Knob("margin", 0.0, 4.0, scale="linear")
RELATIVE = Knob("coefficient", 0.2, 20.0, relative=True)
PLACES = st.floats(-2000, 2000)


def log_share(value: float, low: float, high: float) -> float:
    """How far along a log range a value lies."""
    return math.log(value / low) / math.log(high / low)


# ---- scales


@pytest.mark.parametrize(
    ("knob", "usual", "low", "high", "middle"),
    [
        (ABSOLUTE, 5.0, 1.0, 20.0, math.sqrt(20)),
        (LINEAR, 1.0, 0.0, 4.0, 2.0),
        (RELATIVE, 6.5, 1.3, 130.0, 13.0),
        (Knob("lr", 0.5, 2.0, relative=True), 0.01, 0.005, 0.02, 0.01),
    ],
)
def test_a_range_by_hand(knob: Knob, usual: float, low: float, high: float, middle: float) -> None:
    scale = Scale.of(knob, usual)
    assert (scale.low, scale.high) == pytest.approx((low, high))
    assert scale.value(0.0) == pytest.approx(middle)
    assert (scale.at_share(0.0), scale.at_share(1.0)) == pytest.approx((low, high))
    assert (scale.value(-800.0), scale.value(800.0)) == pytest.approx((low, high))


@given(share=st.floats(0.1, 0.9), knob=st.sampled_from([ABSOLUTE, LINEAR]))
def test_the_start_is_the_usual_value(share: float, knob: Knob) -> None:
    usual = Scale.of(knob, 2.0).at_share(share)
    scale = Scale.of(knob, usual)
    assert scale.value(scale.start) == pytest.approx(usual)


@given(usual=st.floats(1e-6, 1e6), low=st.floats(0.01, 0.4), high=st.floats(2.5, 100))
def test_the_start_of_a_relative_knob(usual: float, low: float, high: float) -> None:
    scale = Scale.of(Knob("any", low, high, relative=True), usual)
    share = log_share(scale.value(scale.start), scale.low, scale.high)
    assert share == pytest.approx(min(max(log_share(1.0, low, high), 0.1), 0.9))


@pytest.mark.parametrize(
    ("knob", "usual", "expected"),
    [
        (LINEAR, 0.0, 0.4),
        (LINEAR, 4.0, 3.6),
        (ABSOLUTE, 1.0, 20**0.1),
        (ABSOLUTE, 20.0, 20**0.9),
        # A usual value beyond the range widens it, and lies at its end.
        (ABSOLUTE, 40.0, 40**0.9),
    ],
)
def test_a_usual_value_at_an_end_starts_a_tenth_inside(
    knob: Knob, usual: float, expected: float
) -> None:
    scale = Scale.of(knob, usual)
    assert scale.low <= usual <= scale.high
    assert scale.value(scale.start) == pytest.approx(expected)


@given(
    place=PLACES,
    knob=st.sampled_from([ABSOLUTE, LINEAR, RELATIVE, *COMMON_KNOBS]),
    usual=st.floats(1e-3, 1e3),
)
def test_no_place_leaves_the_range(place: float, knob: Knob, usual: float) -> None:
    scale = Scale.of(knob, usual)
    slack = 1e-12 * scale.high
    assert scale.low - slack <= scale.value(place) <= scale.high + slack


@given(places=st.lists(st.floats(-10, 10), min_size=2, max_size=2, unique=True))
def test_a_larger_place_is_a_larger_value(places: list[float]) -> None:
    scale = Scale.of(RELATIVE, 6.5)
    assert scale.value(min(places)) <= scale.value(max(places))


def test_multiples_of_nothing_do_not_move() -> None:
    assert not Scale.of(RELATIVE, 0.0).moves
    assert Scale.of(RELATIVE, 1e-9).moves
    found = scales_of(
        (LINEAR, RELATIVE), {"lr": 0.1, "retain_weight": 0.0, "margin": 0, "coefficient": 0.0}
    )
    assert [scale.knob.name for scale in found] == ["lr", "margin"]


def test_every_registered_knob_is_a_setting_that_can_move() -> None:
    for entry in OBJECTIVES:
        defaults = entry.part.__kwdefaults__ or {}
        defaults = {"retain_weight": entry.extras["retain_weight"], **defaults}
        for knob in entry.extras["knobs"]:
            scale = Scale.of(knob, defaults[knob.name])
            assert scale.moves and math.isfinite(scale.start)
            assert scale.knob.scale == "linear" or scale.low > 0


def test_an_objective_has_its_own_range_of_a_common_knob() -> None:
    usual = {"lr": 0.1, "retain_weight": 1200.0, "coefficient": 6.5}
    found = {
        scale.knob.name: scale for scale in scales_of(OBJECTIVES.get("rmu").extras["knobs"], usual)
    }
    assert [*found] == ["lr", "retain_weight", "coefficient"]
    assert (found["retain_weight"].low, found["retain_weight"].high) == (1.2, 12000)
    assert (found["lr"].low, found["lr"].high) == pytest.approx((0.02, 0.5))


# ---- when the actor is asked


def learned(actor: Any, every: int = 3, knobs: Sequence[Knob] = (), **usual: float) -> Learned:
    usual = {"lr": 0.01, "retain_weight": 2.0, **usual}
    return Learned(scales_of(knobs, usual), actor, every, usual["retain_weight"])


def test_the_actor_is_asked_every_few_steps_and_sees_the_latest_point() -> None:
    asked: list[State] = []

    def actor(state: State) -> Any:
        asked.append(state)
        return np.array([float(state.number), -float(state.number)])

    rule = learned(actor)
    points = {3: Point(0.2, 0.9), 6: Point(0.4, 0.8), 7: Point(0.5, 0.1)}
    seen = [rule.at(step, 8, {k: p for k, p in points.items() if k <= step}) for step in range(8)]
    assert asked == [
        State(0.0, START, 0),
        State(3 / 8, Point(0.2, 0.9), 1),
        State(6 / 8, Point(0.4, 0.8), 2),
    ]
    assert list(rule.states.values()) == asked
    for step, dials in enumerate(seen):
        lr, weight = rule.scales
        assert dials.lr == lr.value(step // 3) and dials.forget == 1.0
        assert dials.retain == weight.value(-(step // 3))
        assert dials.knobs == {"lr": dials.lr, "retain_weight": dials.retain}


def test_a_run_taken_up_in_the_middle_takes_its_earlier_actions_again() -> None:
    asked: list[State] = []

    def actor(state: State) -> Any:
        asked.append(state)
        return np.zeros(2)

    learned(actor).at(5, 9, {3: Point(0.3, 0.7)})
    assert asked == [State(0.0, START, 0), State(3 / 9, Point(0.3, 0.7), 1)]


def test_a_weight_of_nothing_stays_and_is_no_knob() -> None:
    dials = learned(lambda _s: np.zeros(1), retain_weight=0.0).at(0, 4, {})
    assert dials.retain == 0.0 and dials.knobs.keys() == {"lr"}


def test_own_settings_are_those_of_the_objective_alone() -> None:
    rule = learned(lambda _s: np.zeros(3), knobs=[RELATIVE], coefficient=6.5)
    dials = rule.at(0, 4, {})
    assert dials.settings == pytest.approx({"coefficient": 13.0})
    assert dials.knobs.keys() == {"lr", "retain_weight", "coefficient"}


# ---- what a run does with the dials


class Dialled:
    """The same dials at every step."""

    def __init__(self, dials: Dials) -> None:
        self.dials = dials

    def at(self, step: int, steps: int, points: Any) -> Dials:
        return self.dials


@pytest.fixture(scope="module")
def bench() -> tiny.Bench:
    return tiny.bench()


def run(bench: tiny.Bench, dials: Dials, **settings: Any) -> TrainingResult:
    trainer = bench.trainer("rmu", **{"steps": 2, **settings})
    trainer.tradeoff = Dialled(dials)
    return trainer.run()


def largest_move(bench: tiny.Bench, result: TrainingResult) -> float:
    weights = bench.segment.weights
    return max(float((w - weights[n].detach()).abs().max()) for n, w in result.weights.items())


@pytest.mark.parametrize("weight", [0.0, 0.3, 7.0])
def test_the_loss_is_forget_plus_the_weighed_retain(bench: tiny.Bench, weight: float) -> None:
    for entry in run(bench, Dials(1.0, weight, 0.02, {}, {"retain_weight": weight})).log:
        assert entry.loss == pytest.approx(entry.forget + weight * entry.retain, rel=1e-5)
        assert entry.retain > 0 or entry.step == 0
        assert entry.knobs == {"retain_weight": weight}


@pytest.mark.parametrize("rate", [1e-3, 4e-2])
def test_the_rate_dialled_is_the_size_of_the_first_step(bench: tiny.Bench, rate: float) -> None:
    """AdamW's first step moves each weight by the rate, whatever its gradient."""
    moved = largest_move(bench, run(bench, Dials(1.0, 1.0, rate), steps=1, lr=0.5))
    assert moved == pytest.approx(rate, rel=1e-3)
    usual = largest_move(bench, run(bench, Dials(1.0, 1.0), steps=1, lr=5e-3))
    assert usual == pytest.approx(5e-3, rel=1e-3)


def test_a_dialled_rate_decays_as_the_runs_own(bench: tiny.Bench) -> None:
    dialled = run(bench, Dials(1.0, 1.0, 0.02), steps=4, lr=0.5)
    own = run(bench, Dials(1.0, 1.0), steps=4, lr=0.02)
    assert all(torch.equal(dialled.weights[name], own.weights[name]) for name in own.weights)


def test_a_dialled_setting_wins_over_the_runs_own(bench: tiny.Bench) -> None:
    bound = {"objective_settings": {"coefficient": 2.0}}
    dialled = run(bench, Dials(1.0, 1.0, None, {"coefficient": 9.0}), **bound)
    given = run(bench, Dials(1.0, 1.0), objective_settings={"coefficient": 9.0})
    without = run(bench, Dials(1.0, 1.0), **bound)
    assert [e.forget for e in dialled.log] == [e.forget for e in given.log]
    assert dialled.log[0].forget > 2 * without.log[0].forget


def test_a_learned_run_logs_what_its_actor_chose(bench: tiny.Bench) -> None:
    """The second action answers to the look before it; both are obeyed and logged."""
    point = Point(0.25, 0.75)
    rule = learned(lambda s: np.array([-1.0, 2.0]) * (1 + s.point.forget), every=2)
    trainer = bench.trainer("rmu", steps=4)
    trainer.tradeoff, trainer.watch = rule, Watch(lambda: point, 2, 0.5)
    log = trainer.run().log
    lr, weight = rule.scales
    for entry in log:
        factor = 1.0 if entry.step < 2 else 1.25
        assert entry.knobs == {
            "lr": lr.value(-factor),
            "retain_weight": weight.value(2.0 * factor),
        }
        total = entry.forget + entry.knobs["retain_weight"] * entry.retain
        assert entry.loss == pytest.approx(total, rel=1e-5)
