"""The archive: what is kept follows from the points alone, and its patches are those on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.errors import PatchError
from expunge.evaluation.pareto import hypervolume
from expunge.metalearning.archive import Archive, Entry, collapse_of, load_front, save_front
from expunge.model.patch import Patch
from expunge.training.watch import Point

FLOOR = 0.5
AXIS = st.integers(0, 20).map(lambda n: n / 20)
POINTS = st.lists(st.builds(Point, AXIS, AXIS), min_size=1, max_size=15)


def make_patch(weights: Any, facts: dict[str, Any]) -> Patch:
    before = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return Patch.between(before, weights, metadata={"training": facts})


def archive(folder: Path, size: int = 8, floor: float = FLOOR) -> Archive:
    return Archive(folder, size, floor, make_patch)


def weights(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((2,), value)}


def filled(folder: Path, points: Sequence[tuple[float, float]], size: int = 8) -> Archive:
    """An archive told of points with weights: those of the i-th are i + 1."""
    found = archive(folder, size)
    for index, point in enumerate(points):
        found.add(index, 5, Point(*point), weights(index + 1.0))
    found.prune()
    return found


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def test_dominated_patches_go(tmp_path: Path) -> None:
    found = filled(tmp_path, [(0.2, 0.9), (0.1, 0.8), (0.6, 0.7), (0.3, 0.95)])
    assert [entry.episode for entry in found.entries] == [3, 2]
    assert on_disk(tmp_path) == [
        "episode002-step0005.safetensors",
        "episode003-step0005.safetensors",
    ]


def test_each_patch_holds_its_own_weights_and_facts(tmp_path: Path) -> None:
    found = filled(tmp_path, [(0.2, 0.9), (0.6, 0.7)])
    for entry in found.entries:
        patch = Patch.load(found.path(entry))
        assert patch.deltas["a"].tolist() == [entry.episode + 1.0] * 2
        facts = patch.metadata["training"]
        assert (facts["episode"], facts["step"]) == (entry.episode, 5)
        assert facts["point"] == pytest.approx(entry.point._asdict())


def test_a_point_that_does_not_belong_leaves_no_patch(tmp_path: Path) -> None:
    found = filled(tmp_path, [(0.6, 0.9)])
    before = list(found.entries)
    found.add(1, 5, Point(0.5, 0.8), weights(9.0))
    found.add(2, 5, Point(0.6, 0.9), weights(9.0))  # of equals the first
    assert found.entries == before and len(on_disk(tmp_path)) == 1


def test_points_below_the_floor_count_only_while_there_is_no_other(tmp_path: Path) -> None:
    found = filled(tmp_path, [(0.3, 0.4), (0.9, 0.1)])
    assert [entry.worth for entry in found.entries] == [0.0, 0.0]
    found.add(2, 5, Point(0.1, 0.6), weights(3.0))
    assert [entry.point for entry in found.entries] == [Point(0.1, 0.6)]
    found.add(3, 5, Point(0.95, 0.2), weights(4.0))
    assert len(on_disk(tmp_path)) == 3  # until it is written down that they went
    found.prune()
    assert len(found.entries) == len(on_disk(tmp_path)) == 1


def test_of_too_many_the_one_that_adds_least_goes(tmp_path: Path) -> None:
    """Alone above (0, ½): 0.1·0.4, 0.02·0.1 and 0.4·0.2 by hand; the middle one goes."""
    points = [(0.3, 0.9), (0.32, 0.8), (0.7, 0.7)]
    assert [e.episode for e in filled(tmp_path, points, size=2).entries] == [0, 2]
    assert on_disk(tmp_path) == [
        "episode000-step0005.safetensors",
        "episode002-step0005.safetensors",
    ]


@given(points=POINTS, size=st.integers(1, 4))
def test_what_is_kept_follows_from_the_points_alone(
    tmp_path_factory: pytest.TempPathFactory, points: list[Point], size: int
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    found = filled(folder, points, size)
    again = archive(folder / "none", size)
    for index, point in enumerate(points):
        again.add(index, 5, point, None)
    assert again.entries == found.entries
    assert not (folder / "none").exists()
    assert 1 <= len(found.entries) <= size
    assert on_disk(folder) == sorted(entry.file for entry in found.entries)
    forgets = [entry.point.forget for entry in found.entries]
    assert forgets == sorted(set(forgets))
    if len(points) <= size:
        whole = hypervolume(points, FLOOR)
        assert hypervolume([e.point for e in found.entries], FLOOR) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("usual", "other", "taken"),
    [
        ((0.6, 0.9), (0.62, 0.82), 1),  # .54 against .508: not to be told apart
        ((0.6, 0.9), (0.6, 0.8), 0),  # .54 against .48
        ((0.6, 0.8), (0.5, 0.99), 1),  # .48 against .495: worth more anyway
        ((0.1, 0.9), (0.9, 0.4), 0),  # .09 against nothing
    ],
)
def test_the_fallback_is_taken_only_if_clearly_better(
    tmp_path: Path, usual: tuple[float, float], other: tuple[float, float], taken: int
) -> None:
    found = archive(tmp_path)
    points = (Point(*usual), Point(*other))
    found.entries = [Entry(n, 5, point, point.worth(FLOOR)) for n, point in enumerate(points)]
    found.fallback = 0
    assert found.best.episode == taken
    found.entries = [entry for entry in found.entries if entry.episode == 0]
    assert found.best.episode == 0


def test_the_fallback_pushes_nothing_off_the_front(tmp_path: Path) -> None:
    found = archive(tmp_path)
    found.fallback = 0
    for step, point in enumerate([(0.5, 0.9), (0.9, 0.9)]):
        found.add(0, step, Point(*point), weights(1.0))
    assert [entry.step for entry in found.entries] == [1]
    for step, point in enumerate([(0.2, 0.8), (0.6, 0.7), (0.5, 0.65)]):
        found.add(1, step, Point(*point), weights(1.0))
    assert [(entry.episode, entry.step) for entry in found.entries] == [(1, 0), (1, 1), (0, 1)]


def test_a_front_of_before_can_be_read(tmp_path: Path) -> None:
    """Changes were neither scaled nor averaged then."""
    old = {"episode": 3, "step": 8, "forget": 0.5, "retain": 0.95, "worth": 0.25, "chosen": True}
    (tmp_path / "front.json").write_text(json.dumps([old]))
    (entry,) = load_front(tmp_path)
    assert entry == Entry(3, 8, Point(0.5, 0.95), 0.25, chosen=True) and entry.was_seen


@given(st.lists(st.tuples(st.integers(0, 3), AXIS, AXIS), max_size=25), st.integers(1, 4))
def test_what_is_kept_is_on_its_own_episode_s_front(
    told: list[tuple[int, float, float]], size: int
) -> None:
    """Who plays an episode writes the patches of that alone, and the archive must need no other."""
    told.sort(key=lambda one: one[0])
    written: set[tuple[int, int]] = set()

    def writing(_weights: Any, facts: dict[str, Any]) -> Any:
        written.add((facts["episode"], facts["step"]))
        return SimpleNamespace(save=lambda _path: None)

    whole = Archive(Path("none"), size, FLOOR, writing, fallback=0)
    for episode in sorted({one[0] for one in told}):
        own = Archive(Path("none"), 10_000, FLOOR, writing, fallback=0)
        for step, (_, *axes) in enumerate(one for one in told if one[0] == episode):
            own.add(episode, step, Point(*axes), weights(1.0))
        for step, (_, *axes) in enumerate(one for one in told if one[0] == episode):
            whole.add(episode, step, Point(*axes), None)
            assert len([one for one in whole.entries if one.episode]) <= size
            if step + 1 == sum(one[0] == episode for one in told):
                assert {(one.episode, one.step) for one in whole.entries} <= written


def test_best_is_worth_most_and_of_equals_forgets_most(tmp_path: Path) -> None:
    assert filled(tmp_path, [(0.2, 1.0), (0.6, 0.8), (0.85, 0.55)]).best.episode == 1
    # 0.375·1 = 0.5·0.75, and both are exact.
    assert filled(tmp_path, [(0.375, 1.0), (0.5, 0.75)]).best.point == Point(0.5, 0.75)


def test_prune_removes_what_an_interrupted_episode_left(tmp_path: Path) -> None:
    found = filled(tmp_path, [(0.2, 0.9), (0.6, 0.7)])
    stray = found.path(Entry(7, 9, Point(1.0, 1.0), 1.0))
    make_patch(weights(1.0), {}).save(stray)
    kept = tmp_path / "front" / "notes.txt"
    kept.write_text("mine")
    found.prune()
    assert not stray.exists() and kept.exists()
    assert on_disk(tmp_path) == sorted(entry.file for entry in found.entries)
    archive(tmp_path / "nowhere").prune()  # nothing there, nothing said


# ---- front.json


def test_front_comes_back_as_it_was(tmp_path: Path) -> None:
    entries = filled(tmp_path, [(0.2, 0.9), (0.6, 0.7)]).entries
    entries = [entries[0], replace(entries[1], chosen=True)]
    save_front(tmp_path, entries)
    assert load_front(tmp_path) == entries
    rows = json.loads((tmp_path / "front.json").read_text())
    assert all((tmp_path / "front" / row["file"]).exists() for row in rows)
    assert [row["chosen"] for row in rows] == [False, True]


@pytest.mark.parametrize("content", [None, "", "{", '[{"episode": 1}]', "[1]", "7"])
def test_a_folder_without_a_front_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "front.json").write_text(content)
    with pytest.raises(PatchError, match="No front in") as caught:
        load_front(tmp_path)
    assert "--tradeoff learned" in caught.value.fix


@pytest.mark.parametrize(
    ("episode", "collapsed", "restored"),
    [(0, None, None), (1, 12, 8), (2, None, None), (3, None, None)],
)
def test_a_collapse_is_told_of_the_training_that_was_taken(
    episode: int, collapsed: int | None, restored: int | None
) -> None:
    tried = [{"ended": "whole", "steps": 16}, {"ended": "collapsed", "steps": 12}, {"steps": 16}]
    entry = Entry(episode, 8, Point(0.5, 0.9), 0.4)
    assert collapse_of(entry, tried) == {"collapsed": collapsed, "restored": restored}
    # Of a mean the second counts too.
    mean = replace(Entry(2, 16, Point(0.5, 0.9), 0.4), other=(episode, 8))
    assert collapse_of(mean, tried) == {"collapsed": collapsed, "restored": restored}
