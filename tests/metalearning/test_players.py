"""Episodes in processes of their own: what they leave is what one process leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from test_episodes import FIRST, LEAST, recipe

from expunge import players
from expunge.errors import DataError, RecipeError, ResourceError
from expunge.metalearning import exploring
from expunge.metalearning.archive import load_front
from expunge.metalearning.episodes import EPISODES_NAME, EpisodeLog
from expunge.metalearning.playing import TOGETHER, Episodes
from expunge.model.boundaries import BoundaryStore
from expunge.model.patch import Patch
from expunge.processes import one_thread
from expunge.recipe import Recipe
from expunge.run import run
from expunge.workbench import Workbench

COUNT = LEAST + 2 * TOGETHER


def left(folder: Path) -> tuple[Any, ...]:
    """What a run leaves, but for the time that it took."""
    lines = (folder / EPISODES_NAME).read_text(encoding="utf-8").splitlines()
    episodes = [{**json.loads(line), "seconds": 0} for line in lines]
    patches = {path.name: Patch.load(path) for path in sorted(folder.glob("front/*.safetensors"))}
    patches["own"] = Patch.load(folder / "patch.safetensors")
    deltas = {
        f"{name} {key}": delta.tolist()
        for name, patch in patches.items()
        for key, delta in patch.deltas.items()
    }
    logs = {path.name for path in folder.glob("front/*.jsonl")}
    return episodes, load_front(folder), deltas, logs


def short(files: dict[str, Path], **changes: Any) -> Recipe:
    return recipe(files, episode_steps=2, evaluate=False, **changes)


def run_interrupted(own: Recipe, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(own, folder, workers=2)


# ---- rounds


def test_one_policy_plays_a_round(files: dict[str, Path]) -> None:
    """What an episode of a round teaches moves none of the same round, and all after it."""
    bench = Workbench(short(files, episodes=COUNT))
    found = Episodes(bench.learning, bench.recipe)
    assert found.round == range(FIRST)
    acted = []
    for number in range(COUNT):
        assert found.round.start == number
        acted.append(found.acting)
        assert number != FIRST or found.acting is found.policy
        found.learn(found.play(found.actor(number), number)[0])
    begun, first, second = (acted[number] for number in (FIRST, LEAST, LEAST + TOGETHER))
    assert acted[FIRST:] == [begun] * (LEAST - FIRST) + [first] * TOGETHER + [second] * TOGETHER
    assert len({id(policy) for policy in (begun, first, second)}) == 3
    assert not found.round


@pytest.mark.parametrize(
    "played, episodes, expected", [(0, 3, 3), (2, 30, 6), (6, 30, 11), (6, 9, 9), (12, 30, 13)]
)
def test_a_round_ends_with_the_episodes(
    files: dict[str, Path], played: int, episodes: int, expected: int
) -> None:
    found = Episodes(Workbench(short(files)).learning, short(files, episodes=episodes))
    found.played = [None] * played  # type: ignore[list-item]
    assert found.round == range(played, expected)


def test_trials_of_a_search_are_one_round(files: dict[str, Path]) -> None:
    own = short(files, tradeoff="search", episodes=9)
    assert Episodes(Workbench(own).learning, own).round == range(9)


# ---- processes


KINDS: dict[str, dict[str, Any]] = {
    "learned": {"episodes": COUNT},
    "search": {"tradeoff": "search", "episodes": 5},
}


@pytest.fixture(scope="module", params=KINDS)
def by_two(
    request: pytest.FixtureRequest, files: dict[str, Path], tmp_path_factory: Any
) -> tuple[Recipe, Path]:
    """A finished run of two processes; not to be changed."""
    own, folder = short(files, **KINDS[request.param]), tmp_path_factory.mktemp("by_two") / "run"
    run(own, folder, workers=2)
    return own, folder


def test_processes_leave_what_one_leaves(by_two: tuple[Recipe, Path], tmp_path: Path) -> None:
    own, folder = by_two
    with one_thread():
        run(own, tmp_path / "one")
    assert left(folder) == left(tmp_path / "one")


@pytest.mark.parametrize(("layer", "opened"), [(2, True), ("auto", False)])
def test_a_process_begins_with_its_boundaries_where_the_layer_is_known(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layer: Any,
    opened: bool,
) -> None:
    own = short(files, layer=layer)
    bench = Workbench(own)
    monkeypatch.setattr(players, "kept_bench", lambda _recipe: bench)
    computed = []
    real = BoundaryStore.compute
    monkeypatch.setattr(
        BoundaryStore,
        "compute",
        lambda *args, **given: (computed.append(1), real(*args, **given))[1],
    )
    players.open_bench(own)
    assert bool(computed) is opened
    before = len(computed)
    if opened:
        players.play(bench, own, tmp_path, 1, None)
        assert len(computed) == before


@pytest.mark.parametrize("by_two", ["learned"], indirect=True)
def test_a_run_goes_on_in_the_middle_of_a_round(
    by_two: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its policy is that of the round's beginning, though one of the round has taught since."""
    own, whole = by_two
    real = EpisodeLog.write

    def write(self: EpisodeLog, episodes: Any) -> None:
        real(self, episodes)
        if len(episodes) == LEAST + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(EpisodeLog, "write", write)
        run_interrupted(own, tmp_path / "parts")
    run(own, tmp_path / "parts", workers=2)
    assert left(tmp_path / "parts") == left(whole)


@pytest.mark.parametrize("by_two", ["search"], indirect=True)
def test_what_is_finished_is_written_down(
    by_two: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials of a search are one round; a kill loses those under way alone."""
    own, whole = by_two
    real, begun = players.play, []

    def play(*given: Any) -> Any:
        begun.append(given[3])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(players, "play", play)
        run_interrupted(own, tmp_path / "parts")
    _, *lines = (tmp_path / "parts" / EPISODES_NAME).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["number"] == 0
    run(own, tmp_path / "parts", workers=2)
    assert left(tmp_path / "parts") == left(whole)


def test_all_that_processes_share_is_computed_on_one_thread(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boundaries, looks and steps of episodes; the last run has all threads again."""
    threads: dict[str, set[int]] = {}

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **settings: Any) -> Any:
            if "_play_last" not in threads:  # what comes after is shared with nobody
                threads.setdefault(name, set()).add(torch.get_num_threads())
            return real(*args, **settings)

        monkeypatch.setattr(owner, name, noted)

    noting(BoundaryStore, "compute")
    noting(players, "play")
    noting(exploring, "_play_last")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(short(files, episodes=2), tmp_path / "run", workers=2)
    finally:
        torch.set_num_threads(before)
    assert threads == {"compute": {1}, "play": {1}, "_play_last": {2}}


def test_none_begins_where_all_is_played(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = short(files, episodes=2)
    with monkeypatch.context() as patched:
        patched.setattr(exploring, "_play_last", _interrupted)
        run_interrupted(own, tmp_path / "parts")
    run(own, tmp_path / "whole", workers=2)
    monkeypatch.setattr(players, "process_pool", None)
    run(own, tmp_path / "parts", workers=2)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [2, None])
def test_a_script_that_does_its_work_when_imported_is_refused(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
) -> None:
    """Before it touches the folder, which belongs to the process that began this one."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RecipeError, match="imported by a process"):
        run(short(files), tmp_path / "run", workers=workers, fresh=True)
    assert not (tmp_path / "run").exists()


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(players, "play_there", _die)
    with pytest.raises(ResourceError, match="was killed"):
        run(short(files, episodes=2), tmp_path / "run", workers=2)


def test_data_that_changed_under_a_run(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process reads the files for itself, and would go on with others."""
    retain = tmp_path / "retain.txt"
    retain.write_text(files["retain.txt"].read_text())
    own = short(files, episodes=2, retain=str(retain))
    bench = Workbench(own)
    _ = bench.data
    retain.write_text("\n".join(retain.read_text().splitlines()[:-5]))
    with pytest.raises(DataError, match="changed while") as told:
        run(own, tmp_path / "run", bench=bench, workers=2)
    assert told.value.got == str(retain)


@pytest.mark.parametrize(
    "changes, cores, expected",
    [
        ({}, 8, TOGETHER),
        ({}, 1, 1),
        ({"tradeoff": "search", "episodes": 6}, 4, 4),
        ({"tradeoff": "search", "episodes": 3}, 4, 3),
        ({"tradeoff": "fixed"}, 4, 1),
    ],
)
def test_how_many_processes(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    cores: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    bench = Workbench(short(files, **changes))
    with players.players_of(bench.recipe, bench, None, tmp_path) as found:
        assert (1 if found is None else found.count) == expected
    monkeypatch.setattr(players, "SMALL", 1000)
    with players.players_of(bench.recipe, bench, None, tmp_path) as found:
        assert found is None
    # But where it is asked for.
    with players.players_of(bench.recipe, bench, 3, tmp_path) as found:
        assert (found is None) == (bench.recipe.tradeoff == "fixed")


def test_nobody_waits_until_the_others_are_there(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool's first job blocks while its processes import; meanwhile the run goes on."""
    go_on, asked = Event(), []

    class Slow:
        def submit(self, *job: Any) -> Any:
            assert go_on.wait(60)
            asked.append(job)
            raise BrokenProcessPool

        def shutdown(self, **_: Any) -> None:
            pass

    monkeypatch.setattr(players, "process_pool", lambda _count: Slow())
    own = short(files, episodes=COUNT)
    with players.players_of(own, Workbench(own), 2, tmp_path) as made:
        assert made is not None and not asked
        go_on.set()
        # What kept them from beginning is told by the first episode that they are asked for.
        with pytest.raises(ResourceError, match="killed"):
            list(made(own, tmp_path, range(2), None))
        assert len(asked) == 1
