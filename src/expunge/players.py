"""Processes that play the episodes of a run side by side.

What a small model computes is many small operations, for which two threads are hardly faster than
one; two processes do more in the same time, how much more depends on the cores (LOG.md). The run's
own process is one of them; each other opens the base and the data for itself, so that nothing but
numbers of episodes, policies and what was seen is handed over; patches go through the run's folder.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from pathlib import Path

from expunge.benches import kept_bench
from expunge.errors import DataError
from expunge.learning import method_of, reads_outputs
from expunge.metalearning.episodes import EPISODES_NAME, Episode
from expunge.metalearning.exploring import Players, archive_of, play_one
from expunge.metalearning.playing import TOGETHER, Episodes
from expunge.processes import Failure, attempt, killed_error, process_pool, stop_processes
from expunge.recipe import Recipe
from expunge.training.policy import Policy
from expunge.training.tradeoff import EXPLORING
from expunge.workbench import Workbench

# Weights of a base that processes are begun for, in bytes. In a larger one, single operations keep
# the cores busy, and each process would hold it once more.
SMALL = 2**27
# Processes of a search that are begun unasked: each holds boundaries of its own.
MOST = 4
# Points of one episode that are kept until it is taken in: all that no other dominates.
ALL = 10_000


@contextmanager
def players_of(
    recipe: Recipe, bench: Workbench, count: int | None, folder: Path
) -> Iterator[Players | None]:
    """What plays a run's episodes; None: the run itself does. Its processes end with the block.

    Args:
        count: of processes, this one included; None: those that gain, so this one alone on a GPU
            or for a larger base.
        folder: of the run; where all its episodes are played already, no process is begun.
    """
    plays = recipe.tradeoff in EXPLORING and method_of(recipe).kind != "edit"
    if not plays or recipe.policy_from or bench.start is not None:
        count = 1
    elif count is None:
        count = _default_count(recipe, bench)
    if count == 1:
        yield None
        return
    players = None
    try:
        players = _Players(count, bench)
        if not _all_played(recipe, folder):
            players.begin(recipe)
        yield players
    finally:
        if players is not None:
            players.stop()


def _default_count(recipe: Recipe, bench: Workbench) -> int:
    weights = sum(tensor.end - tensor.start for tensor in bench.checkpoint.tensors.values())
    if bench.device.type != "cpu" or weights > SMALL:
        return 1
    cores = os.cpu_count() or 1
    return min(cores, MOST if recipe.tradeoff == "search" else TOGETHER, recipe.episodes)


def _all_played(recipe: Recipe, folder: Path) -> bool:
    """Whether the log in a run's folder, a line and then one for each episode, is whole."""
    log = folder / EPISODES_NAME
    return log.exists() and len(log.read_bytes().splitlines()) > recipe.episodes


class _Players:
    """This process and others.

    Args:
        count: of all.
        bench: this process's.
    """

    def __init__(self, count: int, bench: Workbench) -> None:
        self.count, self.bench = count, bench
        self.hashes = dict(bench.data.hashes)
        self._others = {*multiprocessing.active_children()}
        self._pool: ProcessPoolExecutor | None = None
        self._begun: Future[None] | None = None

    def begin(self, recipe: Recipe) -> None:
        """Begin the others, beside what this one has to do before the first episode."""
        self._pool = process_pool(self.count - 1)
        # A pool's first job waits until its processes are there, which takes seconds of imports:
        # a thread waits for them, while this process reads and computes what it needs itself.
        thread = ThreadPoolExecutor(1)
        self._begun = thread.submit(self._open, self._pool, recipe)
        thread.shutdown(wait=False)

    def _open(self, pool: ProcessPoolExecutor, recipe: Recipe) -> None:
        for _ in range(self.count - 1):
            # What fails here fails again in an episode, and is told there.
            pool.submit(attempt, open_bench, recipe)

    def close(self) -> None:
        """End the others, which have nothing more to do."""
        if self._pool is not None:
            self._wait()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def stop(self) -> None:
        """End the others whatever they do, if they have not ended."""
        if self._pool is not None:
            self._wait()
            stop_processes(self._pool, self._others)

    def _wait(self) -> None:
        """Until the others are begun, or failed to."""
        if self._begun is not None:
            wait([self._begun])

    def __call__(
        self, recipe: Recipe, folder: Path, numbers: Sequence[int], policy: Policy | None
    ) -> Iterator[Episode]:
        """These episodes, in this order (`Players`). The first is played here.

        Raises:
            ExpungeError: what an episode met.
            ResourceError: a process was killed.
        """
        assert self._pool is not None and self._begun is not None
        there: dict[int, Future[Episode | Failure]] = {}
        with self._telling():
            self._begun.result()
            for number in numbers[1:]:
                there[number] = self._pool.submit(
                    attempt, play_there, recipe, folder, self.hashes, number, policy
                )
        here = {numbers[0]: play(self.bench, recipe, folder, numbers[0], policy)}
        for number in numbers:
            # Rather than wait, play what none has taken: all come to the same bits.
            while number in there and not there[number].done():
                own = next((n for n, other in there.items() if other.cancel()), None)
                if own is None:
                    break
                del there[own]
                here[own] = play(self.bench, recipe, folder, own, policy)
            yield here.pop(number) if number in here else self._found(there.pop(number))

    def _found(self, future: Future[Episode | Failure]) -> Episode:
        with self._telling():
            found = future.result()
        if isinstance(found, Failure):
            raise found.error
        return found

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BrokenExecutor as error:
            raise killed_error("played episodes", f"{self.count} episodes at a time") from error


def open_bench(recipe: Recipe) -> None:
    """Make in this process what all its episodes need, before the first is asked for.

    Where the layer is to be found by short runs, of the run's own process, that is the base and
    the tokens.
    """
    bench = kept_bench(recipe)
    bench.learning.opened(recipe.model, None if reads_outputs(recipe) else 1)
    bench.learning.tokens(recipe)
    if not bench.calibrates(recipe):
        settled, _ = bench.settled(recipe)
        _ = Episodes(bench.learning, settled).usual


def play_there(
    recipe: Recipe, folder: Path, hashes: Mapping[str, str], number: int, policy: Policy | None
) -> Episode:
    """`play` in a process of its own, on a bench that it keeps.

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
    return play(bench, recipe, folder, number, policy)


def play(
    bench: Workbench, recipe: Recipe, folder: Path, number: int, policy: Policy | None
) -> Episode:
    """One episode; its patches lie in the run's folder."""
    episodes = Episodes(bench.learning, recipe, archive_of(bench.learning, recipe, folder, ALL))
    if policy is not None:
        episodes.acting = policy
    return play_one(episodes, number)


def _changed(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Sources that are not as they were."""
    return sorted(name for name in {**now, **before} if now.get(name) != before.get(name))
