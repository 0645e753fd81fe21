"""An exploration as a whole: what it says of runs that end badly, and of too few episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_episodes import LEAST, recipe
from test_players import left

from expunge import miniature
from expunge.metalearning.calibration import CALIBRATION_NAME
from expunge.metalearning.exploring import explore
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.run import run
from expunge.training.loop import Stage
from expunge.training.state import TrainingState
from expunge.workbench import Workbench
from said import Said


@pytest.fixture(scope="module")
def bench(files: dict[str, Path]) -> Workbench:
    return Workbench(recipe(files, episode_steps=2), Said())


def explored(bench: Workbench, folder: Path, **changes: Any) -> tuple[Patch, str]:
    """The patch, and all that was said."""
    assert isinstance(bench.progress, Said)
    bench.progress.notes.clear()
    patch, _ = explore(bench.learning, bench.recipe.updated(**changes), folder, Stage())
    return patch, "\n".join(bench.progress.notes)


@pytest.mark.parametrize("ended", ["whole", "collapsed", "diverged"])
def test_a_last_run_that_ends_early_is_told(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Any
) -> None:
    real = Episodes.play

    def play(self: Episodes, actor: Any, number: int, **given: Any) -> Any:
        episode, result = real(self, actor, number, **given)
        return replace(episode, ended=ended), result

    monkeypatch.setattr(Episodes, "play", play)
    patch, said = explored(bench, tmp_path, episodes=2)
    told = f"the last run {ended}, last looked at after 6 of 6 steps"
    assert (told in said) == (ended != "whole")
    training = patch.metadata["training"]
    taken = training["tradeoff"]["chosen"]
    of = training["tradeoff"]["tried"][taken["episode"]]
    expected = (of["steps"], taken["step"]) if ended == "collapsed" else (None, None)
    assert (training["collapsed"], training["restored"]) == expected


@pytest.mark.parametrize("beyond", [0, 1])
def test_too_few_episodes_to_learn_from_are_told(
    bench: Workbench, tmp_path: Path, beyond: int
) -> None:
    patch, said = explored(bench, tmp_path, episodes=LEAST - 1 + beyond)
    policy = patch.metadata["training"]["tradeoff"]["policy"]
    # One that was never updated does not answer to what it sees.
    learned = any(weight for row in policy["weights"] for weight in row[1:])
    assert ("too few to update the policy, which takes 11" in said) == (beyond == 0) != learned


# ---- by default: calibrated, looked at by likelihood of questions


def default(files: dict[str, Path], folder: Path) -> Recipe:
    """What `expunge run --tradeoff learned` does with questions, of a few of each."""
    given = {"model": str(miniature.base_directory()), "tradeoff": "learned"}
    for name in ("questions.jsonl", "retain_questions.jsonl", "forget.txt", "retain.txt"):
        lines = files[name].read_text(encoding="utf-8").splitlines(keepends=True)
        path = folder / name
        path.write_text("".join(lines[:40]), encoding="utf-8")
        given[path.stem] = str(path)
    small = {
        "episodes": LEAST + 2,
        "steps": 8,
        "batch_size": 4,
        "look_items": 4,
        "max_tokens": 64,
        "save_every": 2,
    }
    return Recipe.build({**given, **small, "evaluate": False, "retain_floor": 0.5})


def test_one_that_is_interrupted_anywhere_goes_on_by_default_too(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between layers, between episodes of a policy that was updated, and in the last run."""
    own = default(files, tmp_path)
    whole = run(own, tmp_path / "whole")
    played, stepped = Episodes.play, TrainingState.save

    def interrupted(*, episodes: int | None = None, saves: int | None = None) -> None:
        """Until so many episodes were begun, or states saved."""
        count = {"episodes": 0, "saves": 0}

        def tick(what: str, most: int | None) -> None:
            if count[what] == most:
                raise KeyboardInterrupt
            count[what] += 1

        def play(*args: Any, **more: Any) -> Any:
            tick("episodes", episodes)
            return played(*args, **more)

        def save(*args: Any) -> None:
            tick("saves", saves)
            stepped(*args)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Episodes, "play", play)
            patched.setattr(TrainingState, "save", save)
            run(own, tmp_path / "parts")

    interrupted(episodes=2)
    assert not (tmp_path / "parts" / CALIBRATION_NAME).exists()
    interrupted(episodes=3 + LEAST + 1)
    assert (tmp_path / "parts" / CALIBRATION_NAME).exists()
    interrupted(saves=2)
    again = run(own, tmp_path / "parts")
    found, expected = (
        [{**tried, "seconds": 0} for tried in record.training["calibration"]["tried"]]
        for record in (again, whole)
    )
    assert found == expected and len(found) == 3
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    assert len(left(tmp_path / "whole")[0]) == 1 + (LEAST + 2) + 1
