"""The choice at the end: the best change is tried at other scales, step by step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_episodes import recipe

from expunge.evaluation.pareto import hypervolume
from expunge.metalearning.archive import Archive, Entry, load_front
from expunge.metalearning.choosing import SCALES, rescaled, settle
from expunge.metalearning.episodes import EPISODES_NAME
from expunge.metalearning.exploring import archive_of
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
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


def test_of_points_worth_nothing_the_worth_above_none_tells() -> None:
    found, _ = rescaled(
        Entry(0, 8, Point(0.4, 0.2), 0.0),
        lambda scale: Entry(0, 8, Point(0.4 * scale, 0.2), 0.0, scale=scale),
    )
    assert found.scale == SCALES[1]


def test_names_of_files_tell_scales() -> None:
    assert at_worth(0.4).file == "episode003-step0008.safetensors"
    assert at_worth(0.4, 1.2).file == "episode003-step0008-scale1.2.safetensors"
    assert Entry.from_dict(at_worth(0.4, 1.2).to_dict()) == at_worth(0.4, 1.2)


def test_the_patch_that_is_taken_is_the_one_that_was_seen(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """At its scale it shows the point that is told, and is worth more than at any neighbour."""
    own = recipe(files, steps=4, episodes=1, lr=0.003)
    bench = Workbench(own)
    archive = archive_of(bench.learning, own, tmp_path, own.front_size)
    episodes = Episodes(bench.learning, own, archive)
    for number in range(2):
        episodes.learn(episodes.play(episodes.actor(number), number)[0])
    before = list(archive.entries)
    looks = settle(episodes, archive)
    taken = archive.best
    assert taken.scale != 1 and looks > len(before)
    plain = next(one for one in archive.entries if one.file == replace(taken, scale=1.0).file)
    assert taken.worth > plain.worth and len(archive.entries) == len(before) + 1
    assert archive.entries == sorted(archive.entries, key=lambda entry: entry.point)
    whole, scaled = (Patch.load(archive.path(one)) for one in (plain, taken))
    for name, delta in whole.deltas.items():
        assert torch.allclose(scaled.deltas[name], delta * taken.scale, atol=0, rtol=1e-6)


def test_a_run_takes_the_scaled_patch(files: dict[str, Path], tmp_path: Path) -> None:
    own = recipe(files, steps=4, episodes=1, lr=0.003, evaluate=False)
    record = run(own, tmp_path)
    front = load_front(tmp_path)
    chosen = next(entry for entry in front if entry.chosen)
    assert chosen.scale != 1
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
