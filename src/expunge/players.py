"""Processes that play the episodes of a run side by side.

What a small model computes is many small operations: two threads are hardly faster than one
(LOG.md), two processes nearly twice as fast. Each opens the base and the data for itself, so that
nothing but numbers of episodes, policies and what was seen is handed over; patches go through the
run's folder.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from expunge.benches import kept_bench
from expunge.errors import DataError
from expunge.learning import method_of
from expunge.metalearning.episodes import Episode
from expunge.metalearning.exploring import Players, archive_of, play_one
from expunge.metalearning.playing import TOGETHER, Episodes
from expunge.processes import Failure, attempt, lost, process_pool, stop_processes
from expunge.recipe import Recipe
from expunge.training.policy import Policy
from expunge.training.tradeoff import EXPLORING
from expunge.workbench import Workbench

# Weights of a base that processes are begun for, in bytes. In a larger one, single operations keep
# the cores busy, and each process would hold it once more.
SMALL = 2**27
# Points of one episode that are kept until it is taken in: all that no other dominates.
ALL = 10_000


@contextmanager
def players_of(recipe: Recipe, bench: Workbench, count: int | None) -> Iterator[Players | None]:
    """What plays a run's episodes; None: the run itself does. Its processes end with the block.

    Args:
        count: of processes; None: those that gain, so none on a GPU or for a larger base.
    """
    plays = recipe.tradeoff in EXPLORING and method_of(recipe).kind != "edit"
    if not plays or recipe.policy_from or bench.start is not None:
        count = 1
    elif count is None:
        count = _default_count(recipe, bench)
    if count == 1:
        yield None
        return
    pool = _Pool(count, dict(bench.data.hashes))
    try:
        yield pool
    finally:
        pool.stop()


def _default_count(recipe: Recipe, bench: Workbench) -> int:
    weights = sum(tensor.end - tensor.start for tensor in bench.checkpoint.tensors.values())
    if bench.device.type != "cpu" or weights > SMALL:
        return 1
    cores = os.cpu_count() or 1
    return min(cores, recipe.episodes if recipe.tradeoff == "search" else TOGETHER)


class _Pool:
    """Processes that play episodes of one run; they begin when first needed.

    Args:
        hashes: of the data that the run read: source -> hash.
    """

    def __init__(self, count: int, hashes: dict[str, str]) -> None:
        self.count, self.hashes = count, hashes
        self._others = {*multiprocessing.active_children()}
        self._pool: ProcessPoolExecutor | None = None

    def stop(self) -> None:
        """End them: all that was asked for has come, or else nobody waits for it."""
        if self._pool is not None:
            stop_processes(self._pool, self._others)

    def __call__(
        self, recipe: Recipe, folder: Path, numbers: Iterable[int], policy: Policy | None
    ) -> Iterator[Episode]:
        """These episodes, in this order (`Players`).

        Raises:
            ExpungeError: what an episode met.
            ResourceError: a process was killed.
        """
        if self._pool is None:
            self._pool = process_pool(self.count)
        futures = [
            self._pool.submit(attempt, play, recipe, folder, self.hashes, number, policy)
            for number in numbers
        ]
        for future in futures:
            try:
                found = future.result()
            except BrokenExecutor as error:
                memory = f"{self.count} episodes at a time"
                raise lost("played episodes", memory) from error
            if isinstance(found, Failure):
                raise found.error
            yield found


def play(
    recipe: Recipe, folder: Path, hashes: Mapping[str, str], number: int, policy: Policy | None
) -> Episode:
    """One episode, in a process of its own; its patches lie in the run's folder.

    Raises DataError if the data is no longer what the run had read.
    """
    bench = kept_bench(recipe)
    if dict(bench.data.hashes) != hashes:
        raise DataError(
            what="The data changed while the run was under way",
            got=", ".join(_changed(bench.data.hashes, hashes)),
            allowed="files that stay as they are until the run is finished",
            fix="put the files back as they were, or start again with --fresh",
        )
    episodes = Episodes(bench.learning, recipe, archive_of(bench.learning, recipe, folder, ALL))
    if policy is not None:
        episodes.acting = policy
    return play_one(episodes, number)


def _changed(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Sources that are not as they were."""
    return sorted(name for name in {**now, **before} if now.get(name) != before.get(name))
