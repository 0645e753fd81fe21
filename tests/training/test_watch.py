"""Looks while a run goes on: when they are taken, what is kept, what a collapse leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from expunge.errors import TrainingError
from expunge.training.log import StepLog, read_losses
from expunge.training.loop import Stage, TrainingResult
from expunge.training.state import TrainingState
from expunge.training.watch import Point, Watch

STEPS, FLOOR = 8, 0.5
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def bench() -> tiny.Bench:
    return tiny.bench()


@dataclass
class Told:
    """Points that a watch told of, with copies of the weights."""

    points: dict[int, Point] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor] | None] = field(default_factory=dict)

    def __call__(self, done: int, point: Point, weights: Weights | None) -> None:
        self.points[done] = point
        copied = None if weights is None else {n: w.detach().clone() for n, w in weights.items()}
        self.weights[done] = copied


def moved(bench: tiny.Bench, unit: float) -> Any:
    """A look that is a function of the weights: how far they are from the base's, in ``unit``."""
    originals = {name: p.detach().clone() for name, p in bench.segment.weights.items()}

    def look() -> Point:
        squares = [
            float((p.detach() - originals[n]).square().sum())
            for n, p in bench.segment.weights.items()
        ]
        share = min(1.0, sum(squares) ** 0.5 / unit)
        return Point(share, 1 - share)

    return look


def scripted(points: Iterable[tuple[float, float]]) -> Any:
    rest = iter(points)
    return lambda: Point(*next(rest))


def run(
    bench: tiny.Bench,
    watch: Watch | None,
    stage: Stage | None = None,
    on_step: Any = lambda _log: None,
    **settings: Any,
) -> TrainingResult:
    trainer = bench.trainer(**{"steps": STEPS, "lr_schedule": "constant", **settings})
    trainer.watch = watch
    return trainer.run(stage or Stage(), on_step)


def same(one: Weights | None, other: Weights) -> bool:
    return one is not None and all(torch.equal(one[name], other[name]) for name in other)


# ---- points


@pytest.mark.parametrize(
    ("point", "floor", "area"),
    [
        ((0.0, 1.0), 0.9, 0.0),
        ((0.5, 0.95), 0.9, 0.25),
        ((1.0, 1.0), 0.9, 1.0),
        ((0.5, 0.9), 0.9, 0.0),
        ((1.0, 0.2), 0.9, 0.0),
        ((-0.1, 1.0), 0.5, 0.0),
        ((0.4, 0.75), 0.0, 0.3),
    ],
)
def test_area_above_the_floor_by_hand(
    point: tuple[float, float], floor: float, area: float
) -> None:
    assert Point(*point).area(floor) == pytest.approx(area)


@pytest.mark.parametrize(
    ("point", "floor", "worth"),
    [
        ((0.8, 0.95), 0.9, 0.8 * 0.95),
        ((0.8, 0.9), 0.9, 0.0),
        ((0.8, 0.6), 0.9, 0.0),
        ((0.8, 0.6), 0.5, 0.8 * 0.6),
        ((-0.1, 1.0), 0.9, 0.0),
        ((0.8, 0.0), 0.0, 0.0),
    ],
)
def test_worth_is_forget_times_retain_above_the_floor(
    point: tuple[float, float], floor: float, worth: float
) -> None:
    assert Point(*point).worth(floor) == pytest.approx(worth)


# ---- when it looks, and what it keeps


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [*range(1, 9)]), (3, [3, 6, 8]), (4, [4, 8]), (8, [8]), (100, [8])],
)
def test_looks_are_taken_every_few_steps_and_after_the_last(
    bench: tiny.Bench, every: int, expected: list[int]
) -> None:
    told = Told()
    watch = Watch(moved(bench, 100.0), every, FLOOR, on_point=told)
    result = run(bench, watch)
    assert [*watch.points] == [*told.points] == expected
    assert {e.step + 1: e.point for e in result.log if e.point is not None} == watch.points
    assert (result.collapsed, result.restored) == (None, None)


def test_the_state_of_largest_worth_is_kept(bench: tiny.Bench) -> None:
    """Of equals the first. A run that went through ends with its last weights all the same."""
    told = Told()
    look = scripted([(0.2, 1.0), (0.9, 0.8), (0.9, 0.8), (0.9, 0.6)])
    watch = Watch(look, 2, FLOOR, on_point=told)
    result = run(bench, watch)
    assert watch.best_step == 4
    assert same(told.weights[4], watch.best)
    assert same(told.weights[8], result.weights)
    assert not same(told.weights[4], result.weights)


def test_a_watch_changes_nothing_of_a_good_run(bench: tiny.Bench) -> None:
    watched, alone = run(bench, Watch(moved(bench, 100.0), 2, FLOOR)), run(bench, None)
    assert same(watched.weights, alone.weights)
    assert [e.loss for e in watched.log] == [e.loss for e in alone.log]
    assert all(entry.point is None for entry in alone.log)


# ---- collapse


def test_a_collapse_ends_the_run_with_its_best_state(bench: tiny.Bench) -> None:
    told = Told()
    look = scripted([(0.3, 0.9), (0.8, 0.9), (0.9, 0.6), (1.0, 0.49)])
    watch = Watch(look, 1, FLOOR, on_point=told)
    result = run(bench, watch)
    assert (result.collapsed, result.restored, len(result.log)) == (4, 2, 4)
    said: list[str] = []
    watch.tell_collapse(said.append)
    assert len(said) == 1 and "after 4 steps" in said[0] and "that of step 2" in said[0]
    assert same(told.weights[2], result.weights)
    # As a run that was to end there.
    assert same(run(bench, None, steps=2).weights, result.weights)


def test_retain_at_the_floor_is_no_collapse(bench: tiny.Bench) -> None:
    watch = Watch(lambda: Point(0.5, FLOOR), 2, FLOOR)
    result = run(bench, watch)
    assert result.collapsed is None and len(result.log) == STEPS
    watch.tell_collapse(pytest.fail)


def test_a_collapse_before_any_good_state_is_an_error(bench: tiny.Bench) -> None:
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    with pytest.raises(TrainingError, match="collapsed within 3 steps") as caught:
        run(bench, Watch(lambda: Point(1.0, 0.25), 3, FLOOR))
    assert "0.25" in caught.value.got and "0.5" in caught.value.allowed
    assert same(before, dict(bench.model.named_parameters()))


def test_one_that_keeps_nothing_leaves_the_collapsed_weights(bench: tiny.Bench) -> None:
    told = Told()
    look = scripted([(0.8, 0.9), (1.0, 0.1)])
    watch = Watch(look, 2, FLOOR, keep_best=False, on_point=told)
    result = run(bench, watch)
    assert (result.collapsed, result.restored, watch.best) == (4, None, {})
    assert same(told.weights[4], result.weights)


def test_the_best_state_is_a_copy_that_later_steps_leave_alone(bench: tiny.Bench) -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    watch = Watch(lambda: Point(0.5, 0.9), 1, FLOOR)
    watch.after(1, 9, weights)
    with torch.no_grad():
        weights["a"] += 1
    assert watch.best["a"].tolist() == [0.0, 0.0]
    watch.restore(weights)
    assert weights["a"].tolist() == [0.0, 0.0]


# ---- resume


def at(folder: Path) -> Stage:
    return Stage(folder / "state", folder / "losses.jsonl", "here")


def stop_after(k: int) -> Any:
    def on_step(entry: StepLog) -> None:
        if entry.step + 1 == k:
            raise KeyboardInterrupt

    return on_step


def timeless(log: Any) -> list[dict[str, Any]]:
    """Points from a file are lists."""
    return [
        {**vars(e), "seconds": 0, "point": None if e.point is None else [*e.point]} for e in log
    ]


# name -> unit in which the weights move, steps at which they collapsed, step of the best state
ENDS = {"through": (100.0, None, None), "collapse": (3.5, 6, 2)}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_a_resumed_run_ends_as_the_uninterrupted(
    name: str, k: int, bench: tiny.Bench, tmp_path: Path
) -> None:
    unit, collapsed, restored = ENDS[name]

    def watch(told: Told) -> Watch:
        return Watch(moved(bench, unit), 2, FLOOR, on_point=told)

    first, second, whole = Told(), Told(), Told()
    expected = run(bench, watch(whole))
    assert (expected.collapsed, expected.restored) == (collapsed, restored)
    with pytest.raises(KeyboardInterrupt):
        run(bench, watch(first), at(tmp_path), stop_after(k))
    assert TrainingState.load(tmp_path / "state").step == k
    resumed = run(bench, watch(second), at(tmp_path))
    assert (resumed.collapsed, resumed.restored) == (collapsed, restored)
    assert same(resumed.weights, expected.weights)
    assert timeless(resumed.log) == timeless(expected.log)
    assert timeless(read_losses(tmp_path / "losses.jsonl")) == timeless(expected.log)
    # All points are told once more: those of the interrupted run without weights.
    assert second.points == whole.points
    for done, weights in second.weights.items():
        assert weights is None if done <= k else same(weights, whole.weights[done] or {})


def test_a_collapsed_run_is_not_trained_again(bench: tiny.Bench, tmp_path: Path) -> None:
    unit, collapsed, restored = ENDS["collapse"]
    once = run(bench, Watch(moved(bench, unit), 2, FLOOR), at(tmp_path))
    seen: list[int] = []
    again = run(
        bench,
        Watch(moved(bench, unit), 2, FLOOR),
        at(tmp_path),
        lambda entry: seen.append(entry.step),
    )
    assert seen == [] and (again.collapsed, again.restored) == (collapsed, restored)
    assert same(again.weights, once.weights)


def test_an_early_collapse_is_told_again_on_resume(bench: tiny.Bench, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(bench, Watch(lambda: Point(1, 0), 2, FLOOR), at(tmp_path), stop_after(2))
    with pytest.raises(TrainingError, match="collapsed within 2 steps"):
        run(bench, Watch(lambda: Point(0, 1), 2, FLOOR), at(tmp_path))
