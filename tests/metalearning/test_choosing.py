"""The choice at the end: the best change is tried at other scales, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_episodes import recipe

from expunge.evaluation.looks import LookKind
from expunge.evaluation.pareto import hypervolume
from expunge.learning import Learning
from expunge.metalearning.archive import (
    FRONT_FILE,
    FRONT_LEFTOVER,
    Archive,
    Entry,
    load_front,
)
from expunge.metalearning.choosing import SCALES, rescaled, settle
from expunge.metalearning.episodes import EPISODES_NAME
from expunge.metalearning.exploring import archive_of
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.run import run
from expunge.training.watch import Point
from expunge.workbench import Workbench


def at_worth(worth: float, scale: float = 1.0) -> Entry:
    return Entry(3, 8, Point(worth, 1.0), worth, scale=scale)


@pytest.mark.parametrize(
    "best, looks",
    [(1.0, 2), (1.1, 2), (1.3, 4), (0.9, 3), (0.6, 6), (9.0, 5), (-9.0, 6)],
)
def test_the_best_scale_is_found_by_steps(best: float, looks: int) -> None:
    """Up while that is better, else down; never further than the limits, nor past the best."""
    asked = []

    def seen(scale: float) -> Entry:
        asked.append(scale)
        return at_worth(1 / (1 + abs(scale - best)), scale)

    found, count = rescaled(seen(1.0), seen)
    assert found.scale == pytest.approx(min(max(best, SCALES[0]), SCALES[1]))
    assert count == looks == len(asked[1:]) and len(set(asked)) == len(asked)
    assert found.worth == max(at for at in (1 / (1 + abs(scale - best)) for scale in asked))


def test_equal_is_not_better() -> None:
    entry = at_worth(0.4)
    assert rescaled(entry, lambda scale: at_worth(0.4, scale)) == (entry, 2)


@pytest.mark.parametrize(("kept", "scale"), [(0.88, 0.9), (0.72, 0.7), (0.1, 1.0)])
def test_of_a_point_worth_nothing_smaller_scales_alone_are_tried(kept: float, scale: float) -> None:
    """Its retain rises there, maybe above the floor of .9; else it stays as it was."""
    asked = []

    def seen(at: float) -> Entry:
        asked.append(at)
        point = Point(0.8 * at, 1 - (1 - kept) * at**3)
        return Entry(0, 8, point, point.worth(0.9), scale=at)

    start = seen(1.0)
    found, looks = rescaled(start, seen)
    assert start.worth == 0 and found.scale == scale
    assert (found.worth > 0) == (scale != 1)
    assert max(asked) == 1.0 and looks == len(asked) - 1


def test_names_of_files_tell_scales() -> None:
    assert at_worth(0.4).file == "episode003-step0008.safetensors"
    assert at_worth(0.4, 1.2).file == "episode003-step0008-scale1.2.safetensors"
    both = replace(at_worth(0.4, 1.2), other=(12, 80))
    assert both.file == "episode003-step0008-and-episode012-step0080-scale1.2.safetensors"
    for entry in (at_worth(0.4, 1.2), both):
        assert Entry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
        assert FRONT_FILE.fullmatch(entry.file)
        leftover = FRONT_LEFTOVER.fullmatch(f".{entry.file}.77.tmp")
        assert leftover is not None and leftover.groups() == ("77",)


# ---- what is taken, of two changes planted by hand


@pytest.fixture
def planted(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[float, float], tuple[float, float]]], tuple[int, Archive]]:
    """(shares of two changes -> forget, retain) -> looks, and the archive once it is settled.

    Episode 1 changes one weight of a matrix by 1, episode 2 another; a look tells what is there.
    """
    own = recipe(files, retain_floor=0.1, collapse_floor=0.0)
    bench = Workbench(own)
    archive = archive_of(bench.learning, own, tmp_path, own.front_size)
    episodes = Episodes(bench.learning, own, archive)
    segment = bench.learning.cut(own).segment
    name, weight = next(iter(segment.weights.items()))
    before = weight.detach().clone()

    def settled(
        seen: Callable[[float, float], tuple[float, float]], look_items: int = 6
    ) -> tuple[int, Archive]:
        def look() -> Point:
            changed = (weight.detach() - before)[0]
            return Point(*seen(float(changed[0]), float(changed[1])))

        for number in (1, 2):
            after = before.clone()
            after[0, number - 1] += 1
            archive.add(number, 6, Point(*seen(number == 1, number == 2)), {name: after})

        def look_at(_learning: Learning, asked: Recipe, kind: LookKind, **given: Any) -> Any:
            # Closer than the looks before it, however close those were.
            assert (asked.look_items, given) == (
                max(256, look_items),
                {"check": False, "most_texts": max(128, look_items)},
            )
            assert kind == episodes.kind
            return look

        monkeypatch.setattr("expunge.metalearning.choosing.look_at", look_at)
        episodes.recipe = own.updated(look_items=look_items)
        return settle(episodes, archive), archive

    return settled


def deltas(archive: Archive, entry: Entry) -> list[float]:
    """Of the two weights that are changed."""
    (delta,) = Patch.load(archive.path(entry)).deltas.values()
    assert int(delta.count_nonzero()) <= 2
    return [round(value, 5) for value in delta[0, :2].tolist()]


def test_the_mean_is_taken_where_it_is_worth_more(planted: Any) -> None:
    """Harm grows with the square of a change, so half of both does half of what one does."""
    looks, archive = planted(
        lambda one, two: (min(1.0, 1.05 * one + 0.95 * two), 1 - 0.4 * one**2 - 0.38 * two**2)
    )
    taken = archive.best
    assert (taken.episode, taken.step, taken.other, taken.scale) == (1, 6, (2, 6), 1.0)
    assert deltas(archive, taken) == [0.5, 0.5]
    assert taken.point == pytest.approx((1.0, 0.805)) and taken.worth == pytest.approx(0.805)
    # Two points; the first at 1.1, .9 and .8; the mean, at 1.1 and at .9.
    assert len(archive.entries) == 3 and looks == 2 + 3 + 3


def test_the_mean_at_another_scale(planted: Any) -> None:
    """Two changes with little in common: half of each forgets too little."""
    _, archive = planted(
        lambda one, two: (min(1.0, 0.75 * one + 0.7 * two), 1 - 0.4 * one**2 - 0.38 * two**2),
        look_items=300,
    )
    taken = archive.best
    assert (taken.other, taken.scale) == ((2, 6), 1.3)
    assert deltas(archive, taken) == [0.65, 0.65]
    assert taken.file == "episode001-step0006-and-episode002-step0006-scale1.3.safetensors"


def test_a_mean_that_is_worth_less_is_not_kept(planted: Any) -> None:
    looks, archive = planted(
        lambda one, two: (
            min(1.0, max(one, 0.9 * two) ** 3),
            1 - 0.4 * one**2 - 0.35 * two**2 - one * two,
        )
    )
    assert archive.best == archive.entries[1] and len(archive.entries) == 2
    # The points; the best up and down; the mean, up to the last scale that keeps anything.
    assert all(entry.was_seen for entry in archive.entries) and looks == 2 + 2 + 1 + 3
    names = {path.name for path in (archive.folder / "front").iterdir()}
    assert names == {entry.file for entry in archive.entries}


def test_a_single_point_has_no_mean(planted: Any) -> None:
    looks, archive = planted(
        lambda one, two: (min(1.0, max(one, 0.1 * two) ** 3), 1 - 0.4 * one - 0.5 * two)
    )
    (entry,) = archive.entries
    assert entry.was_seen and looks == 1 + 2


# ---- a run


def test_a_run_takes_the_scaled_patch(files: dict[str, Path], tmp_path: Path) -> None:
    own = recipe(files, steps=4, episodes=1, lr=0.003, evaluate=False)
    record = run(own, tmp_path)
    front = load_front(tmp_path)
    chosen = next(entry for entry in front if entry.chosen)
    assert not chosen.was_seen
    taken = Patch.load(tmp_path / "patch.safetensors")
    lying = Patch.load(tmp_path / "front" / chosen.file)
    assert all(torch.equal(delta, lying.deltas[name]) for name, delta in taken.deltas.items())
    told: dict[str, Any] = record.training["tradeoff"]["chosen"]
    assert told["scale"] == chosen.scale and told["worth"] == chosen.worth
    # Every look counts: those of the runs, one at each point of the front, those at other scales.
    lines = (tmp_path / EPISODES_NAME).read_text().splitlines()[1:]
    of_runs = sum(len(json.loads(line)["points"]) for line in lines)
    assert record.training["looks"] > of_runs + len(front) - 1
    names = {path.name for path in (tmp_path / "front").iterdir()}
    assert names == {entry.file for entry in front}
    whole = hypervolume([entry.point for entry in front], own.retain_floor)
    assert record.training["tradeoff"]["hypervolume"] == whole


def test_archives_know_their_scaled_files(tmp_path: Path) -> None:
    archive = Archive(tmp_path, 3, 0.5, lambda _weights, _facts: None)  # type: ignore[arg-type]
    (tmp_path / "front").mkdir()
    mine = [at_worth(0.4, scale) for scale in (1.0, 1.2, 0.8)]
    for entry in mine:
        archive.path(entry).touch()
    foreign = tmp_path / "front" / "episode-of-mine.safetensors"
    foreign.touch()
    archive.entries = mine[:2]
    archive.prune()
    assert [archive.path(entry).exists() for entry in mine] == [True, True, False]
    assert foreign.exists()
