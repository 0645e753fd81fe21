"""Several runs of one model and data set, side by side in processes that share nothing.

Every process keeps one bench, so its runs share the opened base and the boundaries. A run is
resumable by itself, so an interrupted batch of jobs goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expunge.errors import ExpungeError
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RunRecord

if TYPE_CHECKING:
    from expunge.run import Workbench


@dataclass(frozen=True)
class Job:
    """One run: its recipe and its folder. All jobs of a batch have model and data in common."""

    recipe: Recipe
    out: Path
    fresh: bool = False


def default_workers(jobs: int) -> int:
    """A process a core, on a machine without a GPU; on one GPU, runs would only wait for it."""
    return 1 if torch.cuda.is_available() else max(1, min(jobs, os.cpu_count() or 1))


def run_jobs(
    jobs: Sequence[Job], *, workers: int | None = None, progress: Progress | None = None
) -> list[RunRecord]:
    """Do all jobs; records in the order of the jobs.

    Args:
        workers: processes; None: a process a core. With one, everything happens in this process.
        progress: told of each finished run.

    Raises:
        ExpungeError: the first that a run met; runs that were finished stay finished.
    """
    progress = progress or Silent()
    workers = default_workers(len(jobs)) if workers is None else workers
    with progress.phase("runs", len(jobs)) as advance:
        if workers == 1:
            records = []
            for job in jobs:
                records.append(_do(job))
                advance(1, job.out.name)
            return records
        found: dict[int, RunRecord] = {}
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, initializer=_one_thread) as pool:
            for index, result in pool.imap_unordered(_numbered, list(enumerate(jobs))):
                if isinstance(result, _Failure):
                    raise _KINDS[result.kind](**result.parts)
                found[index] = result
                advance(1, jobs[index].out.name)
        return [found[index] for index in range(len(jobs))]


_bench: dict[tuple[str, ...], Workbench] = {}
_ALL: list[type[ExpungeError]] = [ExpungeError, *ExpungeError.__subclasses__()]
_KINDS = {kind.__name__: kind for kind in _ALL}


def _one_thread() -> None:
    # The processes are the parallelism; more threads than cores make each of them wait.
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the parent: one with keyword arguments does not travel by itself."""

    kind: str
    parts: dict[str, str]


def _numbered(numbered: tuple[int, Job]) -> tuple[int, RunRecord | _Failure]:
    index, job = numbered
    try:
        return index, _do(job)
    except ExpungeError as error:
        parts = {name: getattr(error, name) for name in ("what", "got", "allowed", "fix")}
        return index, _Failure(type(error).__name__, parts)


def _do(job: Job) -> RunRecord:
    from expunge.run import Workbench, run

    key = (job.recipe.model, *job.recipe.forget, *job.recipe.retain)
    if key not in _bench:
        _bench.clear()
        _bench[key] = Workbench(job.recipe)
    return run(job.recipe, job.out, bench=_bench[key], fresh=job.fresh)
