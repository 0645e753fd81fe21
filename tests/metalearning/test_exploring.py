"""An exploration as a whole: what it says of runs that end badly, and of too few episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_episodes import recipe

from expunge.metalearning.exploring import explore
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
from expunge.progress import Silent
from expunge.recipe import Recipe
from expunge.training.loop import Stage
from expunge.training.policy import PolicySettings
from expunge.workbench import Workbench


class Said(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.notes.append(message)


def explored(own: Recipe, folder: Path) -> tuple[Patch, str]:
    """The patch, and all that was said."""
    said = Said()
    patch, _ = explore(Workbench(own, said).learning, own, folder, Stage())
    return patch, "\n".join(said.notes)


@pytest.mark.parametrize("ended", ["whole", "collapsed", "diverged"])
def test_a_last_run_that_ends_early_is_told(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Any
) -> None:
    real = Episodes.play

    def play(self: Episodes, actor: Any, number: int, **given: Any) -> Any:
        episode, result = real(self, actor, number, **given)
        return replace(episode, ended=ended if number == self.count else "whole"), result

    monkeypatch.setattr(Episodes, "play", play)
    patch, said = explored(recipe(files, episodes=2, episode_steps=2), tmp_path)
    assert (f"the last run {ended} after 6 of 6 steps" in said) == (ended != "whole")
    training = patch.metadata["training"]
    taken = training["tradeoff"]["chosen"]
    lost = ended == "collapsed" and taken["episode"] == 2
    expected = (6, taken["step"]) if lost else (None, None)
    assert (training["collapsed"], training["restored"]) == expected


@pytest.mark.parametrize("beyond", [0, 1])
def test_too_few_episodes_to_learn_from_are_told(
    files: dict[str, Path], tmp_path: Path, beyond: int
) -> None:
    own = recipe(files, episodes=PolicySettings().warm_up + beyond, episode_steps=2)
    patch, said = explored(own, tmp_path)
    learned = patch.metadata["training"]["tradeoff"]["policy"]["weights"]
    usual = Workbench(own)
    before = Episodes(usual.learning, own).policy.to_dict()["weights"]
    assert ("teach nothing" in said) == (beyond == 0) == (learned == before)
