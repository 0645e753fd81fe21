"""Meta-learning of the trade-off: episodes of training teach a policy, a last run uses it.

A search plays episodes too, each a run of full length that holds its knobs, and no last run. Every
episode starts from the base's own weights, on the boundaries that all runs share, and is looked at
on validation after each action. The archive keeps the patches of the points that no other
dominates. The test split is not read here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from expunge.learning import Learning
from expunge.metalearning.archive import (
    FRONT_FOLDER,
    Archive,
    chosen,
    collapse_of,
    losses_file,
    save_front,
)
from expunge.metalearning.choosing import best_of, facts_of
from expunge.metalearning.episodes import EPISODES_NAME, Episode, EpisodeLog
from expunge.metalearning.looking import knob_ranges
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
from expunge.processes import one_thread
from expunge.recipe import Recipe
from expunge.training.log import read_losses, write_losses
from expunge.training.loop import Stage, TrainingResult
from expunge.training.policy import Policy


class Players(Protocol):
    """What plays episodes, ``count`` at a time."""

    count: int

    def close(self) -> None:
        """There are no more to play."""

    def __call__(
        self, recipe: Recipe, folder: Path, numbers: Sequence[int], policy: Policy | None
    ) -> Iterator[Episode]:
        """These episodes, in this order; what they leave (`play_one`) lies in ``folder``."""


def explore(
    learning: Learning,
    recipe: Recipe,
    folder: Path,
    stage: Stage,
    players: Players | None = None,
) -> tuple[Patch, TrainingResult]:
    """Episodes, the last run, and the choice: the patch of the point worth most on validation.

    Goes on where an interrupted exploration stopped, losing at most what was under way. Leaves
    ``episodes.jsonl``, ``front.json`` and the patches of the front in ``folder``.

    Args:
        players: have these play the episodes, but for the last run. All is on one thread until
            then, as it must have been before (`expunge.processes.one_thread`), so that it makes no
            difference to the bits who plays which.

    Raises:
        DataError: nothing to look at, or a base that answers no better than chance.
        TrainingError: ``folder`` holds episodes from other data, another base or other versions.
        DivergedError: nothing could be trained at all, or no state kept the rest.
    """
    archive = archive_of(learning, recipe, folder, recipe.front_size)
    episodes = Episodes(learning, recipe, archive)
    ranges = knob_ranges(recipe)
    log = EpisodeLog(folder / EPISODES_NAME, stage.context, episodes.kind, ranges)
    with one_thread(really=players is not None):
        wall = _play_all(episodes, log, archive, players)
    played = list(episodes.played)
    if not episodes.searches:
        last, result = _play_last(episodes, stage)
        played.append(last)
        log.write(played)
    archive.prune()
    best, closer = best_of(episodes, archive)
    if episodes.searches:
        losses = folder / FRONT_FOLDER / best.losses_file
        result = _of_trial(losses, stage, learning.micro_batch_size)
    entries = chosen(archive.entries, archive.entries.index(best))
    save_front(folder, entries)
    looks = sum(len(one.points) for one in played) + closer
    spent = sum(one.seconds for one in episodes.played) if players is None else wall
    if episodes.searches:  # one of them is the run's own training
        spent = max(0.0, spent - sum(entry.seconds for entry in result.log))
    learning.timing["episodes"] = learning.timing.get("episodes", 0.0) + spent
    facts = facts_of(episodes, played, entries, 1 if players is None else players.count)
    lost = collapse_of(best, facts["tried"])
    found = learning.patch(recipe, result, looks=looks, tradeoff=facts, **lost)
    taken = Patch.load(archive.path(best))
    return replace(found, deltas=taken.deltas, base=taken.base), result


def _of_trial(losses: Path, stage: Stage, micro_batch_size: int) -> TrainingResult:
    """What the trial behind the chosen point logged becomes the run's own log."""
    found = read_losses(losses)
    if stage.losses is not None:
        write_losses(stage.losses, found)
    return TrainingResult({}, tuple(found), micro_batch_size)


def archive_of(learning: Learning, recipe: Recipe, folder: Path, size: int) -> Archive:
    """An archive of patches of this recipe's; the first episode of learning is to fall back on.

    The policy's reward is area above ``retain_floor``, a narrow range, which keeps it where the
    rest is kept. Between points there, a hundredth of the rest counts about as much as one of the
    function (`Point.worth`), not as much as ten.
    """

    def make_patch(weights: Mapping[str, Tensor], facts: dict[str, Any]) -> Patch:
        return learning.patch_of(recipe, weights, facts)

    learns = recipe.tradeoff == "learned" and not recipe.policy_from
    fallback = 0 if learns else None
    return Archive(folder, size, recipe.retain_floor, make_patch, fallback)


def play_one(episodes: Episodes, number: int) -> Episode:
    """An episode, whose patches are in the archive; a trial leaves its log beside them."""
    episode, result = episodes.play(episodes.actor(number), number)
    assert episodes.archive is not None
    if episodes.searches and result.log:
        write_losses(episodes.archive.folder / FRONT_FOLDER / losses_file(number), result.log)
    return episode


def _play_all(
    episodes: Episodes, log: EpisodeLog, archive: Archive, players: Players | None
) -> float:
    """All episodes, after those that the log holds; it is written after each. Seconds it took.

    Those that the log holds count as many as they took one by one.
    """
    _ = episodes.look, episodes.usual
    for episode in log.read()[: episodes.count]:
        episodes.take(episode)
    before = sum(one.seconds for one in episodes.played)
    start = time.perf_counter()
    if not episodes.searches and len(episodes.played) < episodes.count < episodes.least:
        episodes.learning.progress.say(
            f"note: --episodes {episodes.count} is too few to update the policy, which takes "
            f"{episodes.least}: the last run keeps to the usual settings, or to those drawn at "
            "random that gained more"
        )
    if episodes.count:
        with episodes.learning.progress.phase("episodes", episodes.count) as advance:
            advance(len(episodes.played), episodes.note())
            while len(episodes.played) < episodes.count:
                for _ in _play_round(episodes, archive, players):
                    log.write(episodes.played)
                    archive.prune(before=len(episodes.played))
                    advance(1, episodes.note())
    if players is not None:
        players.close()
    return before + time.perf_counter() - start


def _play_round(episodes: Episodes, archive: Archive, players: Players | None) -> Iterator[Episode]:
    """Each of a round's episodes, once it has been learned from."""
    if players is None:
        for number in episodes.round:
            episode = play_one(episodes, number)
            episodes.learn(episode)
            yield episode
        return
    policy = None if episodes.searches else episodes.acting
    for episode in players(episodes.recipe, archive.folder, episodes.round, policy):
        episodes.take(episode)
        yield episode


def _play_last(episodes: Episodes, stage: Stage) -> tuple[Episode, TrainingResult]:
    """The run of full length, with what the episodes taught."""
    recipe, progress = episodes.recipe, episodes.learning.progress
    with progress.phase("train", recipe.steps) as advance:
        last, result = episodes.play(
            episodes.policy.within(episodes.teaching),
            episodes.count,
            steps=recipe.steps,
            stage=stage,
            on_step=lambda: advance(1, episodes.note()),
        )
    if last.ended != "whole":
        progress.say(
            f"the last run {last.ended}, last looked at after {last.steps} of {recipe.steps} "
            "steps; what was seen on validation until then counts"
        )
    return last, result
