"""Several runs, and what is made of several, side by side in processes that share nothing.

Every process keeps the benches of its last runs, so runs of one model and data set share the
opened base and the boundaries. A run is resumable by itself, so an interrupted batch of jobs goes
on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    wait,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from expunge.errors import ExpungeError
from expunge.processes import Failure, attempt, killed_error, process_pool, stop_processes
from expunge.progress import Advance, Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RunRecord


@dataclass(frozen=True)
class Job:
    """One run: its recipe and its folder.

    Attributes:
        sum_of: instead of training, measure the sum of these runs' patches; runs of the same
            batch are waited for.
        control_of: instead of training, measure a random change as large as this run's, which is
            waited for likewise.

    Raises ValueError for a sum that is a control as well.
    """

    recipe: Recipe
    out: Path
    fresh: bool = False
    sum_of: tuple[Path, ...] = ()
    control_of: Path | None = None

    def __post_init__(self) -> None:
        if self.sum_of and self.control_of is not None:
            raise ValueError(f"{self.out} is to be a sum and a control")

    @property
    def waits_for(self) -> tuple[Path, ...]:
        """Folders of the runs that must be finished before."""
        return self.sum_of if self.control_of is None else (self.control_of,)


@dataclass(frozen=True)
class JointJob:
    """Several recipes trained at once (`expunge.interference.joint`); it waits for nothing.

    Attributes:
        balance: whether the gradients of the losses are brought to one size.
    """

    recipes: tuple[Recipe, ...]
    out: Path
    fresh: bool = False
    balance: bool = True
    waits_for: tuple[Path, ...] = ()


@dataclass(frozen=True)
class SequenceJob:
    """Several recipes trained one after the other (`expunge.interference.sequence`).

    Attributes:
        before: folder of the recipes before the last, waited for; None: trained here.
    """

    recipes: tuple[Recipe, ...]
    out: Path
    fresh: bool = False
    before: Path | None = None

    @property
    def waits_for(self) -> tuple[Path, ...]:
        """Folders of jobs that must be done before."""
        return () if self.before is None else (self.before,)


AnyJob = Job | JointJob | SequenceJob


def default_workers(jobs: int) -> int:
    """A process a core, on a machine without a GPU; on one GPU, runs would only wait for it."""
    return 1 if torch.cuda.is_available() else max(1, min(jobs, os.cpu_count() or 1))


Rescue = Callable[[AnyJob, ExpungeError], RunRecord | None]
"""(job, its error) -> what counts as its record; None: the error stands."""


def run_jobs(
    jobs: Sequence[AnyJob], *, workers: int | None = None, progress: Progress | None = None
) -> list[RunRecord]:
    """Do all jobs; records in the order of the jobs.

    Args:
        workers: processes; None: a process a core. With one, everything happens in this process.
        progress: told of each finished run.

    Raises:
        ExpungeError: the first that a run met; runs that were finished stay finished.
    """
    workers = default_workers(len(jobs)) if workers is None else workers
    with Workers(workers, progress=progress or Silent()) as hands:
        return hands.do(jobs)


class Workers:
    """Processes that do one batch of jobs after another and keep their benches; a context manager.

    Args:
        count: of processes. With one, everything happens in this process.
        progress: told of each finished run.
        ray: have a Ray cluster do the jobs; all its machines must see the same files.
    """

    def __init__(self, count: int, *, progress: Progress, ray: bool = False) -> None:
        self.count, self.progress, self.ray = count, progress, ray
        self._pool: Pool | None = None
        self._others = {*multiprocessing.active_children()}

    def __enter__(self) -> Workers:
        if self.ray:
            from expunge.cluster import RayPool

            self._pool = RayPool()
        elif self.count > 1:
            self._pool = process_pool(self.count)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is None or self.ray:
            self._pool.shutdown(wait=True, cancel_futures=True)
            return
        stop_processes(self._pool, self._others)

    def do(
        self, jobs: Sequence[AnyJob], rescue: Rescue = lambda _job, _error: None
    ) -> list[RunRecord]:
        """Do all jobs; records in the order of the jobs.

        Args:
            rescue: asked about each error.

        Raises:
            ExpungeError: the first that a run met, and that was not rescued.
            ResourceError: a process was killed.
        """
        try:
            with self.progress.phase("runs", len(jobs)) as advance:
                if self._pool is not None:
                    return _in_pool(jobs, self._pool, advance, rescue)
                return _here(jobs, advance, rescue)
        except BrokenExecutor as error:
            memory = "a run a core" if self.ray else f"{self.count} runs at a time"
            raise killed_error(
                "did some of the runs", memory, str(error) if self.ray else ""
            ) from error


def _here(jobs: Sequence[AnyJob], advance: Advance, rescue: Rescue) -> list[RunRecord]:
    found: dict[int, RunRecord] = {}
    waiting = dict(enumerate(jobs))
    while waiting:
        index = _ready(waiting, ())[0]
        found[index] = _rescued(waiting.pop(index), rescue)
        advance(1, _name(jobs[index]))
    return [found[index] for index in range(len(jobs))]


def _rescued(job: AnyJob, rescue: Rescue) -> RunRecord:
    try:
        return _do(job)
    except ExpungeError as error:
        record = rescue(job, error)
        if record is None:
            raise
        return record


def _name(job: AnyJob) -> str:
    """What a job is told by: the last folders of its path."""
    return "/".join(job.out.parts[-2:])


def _ready(waiting: Mapping[int, AnyJob], running: Iterable[AnyJob]) -> list[int]:
    """Numbers of the jobs that wait for no other, in the given order."""
    unfinished = {job.out for job in (*waiting.values(), *running)}
    ready = [index for index, job in waiting.items() if unfinished.isdisjoint(job.waits_for)]
    assert ready or running, "a job cannot wait for itself"
    return ready


class Pool(Protocol):
    """What does jobs elsewhere: an executor of `concurrent.futures`, or what looks like one."""

    def submit(self, do: Callable[[AnyJob], Any], job: AnyJob, /) -> Future[Any]:
        """Have a job done."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Start no more."""


def _in_pool(
    jobs: Sequence[AnyJob], pool: Pool, advance: Advance, rescue: Rescue
) -> list[RunRecord]:
    waiting = dict(enumerate(jobs))
    futures: dict[Future[RunRecord | Failure], int] = {}
    found: dict[int, RunRecord] = {}
    while waiting or futures:
        for index in _ready(waiting, [jobs[index] for index in futures.values()]):
            futures[pool.submit(try_job, waiting.pop(index))] = index
        done, _ = wait(futures, return_when=FIRST_COMPLETED)
        for future in done:
            index, result = futures.pop(future), future.result()
            if isinstance(result, Failure):
                record = rescue(jobs[index], result.error)
                if record is None:
                    raise result.error
                result = record
            found[index] = result
            advance(1, _name(jobs[index]))
    return [found[index] for index in range(len(jobs))]


def try_job(job: AnyJob) -> RunRecord | Failure:
    """A job's record, or its error."""
    return attempt(_do, job)


def _do(job: AnyJob) -> RunRecord:
    from expunge.benches import kept_bench
    from expunge.compose import compose, control
    from expunge.interference.joint import joint, joint_recipes
    from expunge.interference.sequence import sequence
    from expunge.run import run

    if isinstance(job, JointJob):
        benches = [kept_bench(recipe) for recipe in joint_recipes(job.recipes)]
        return joint(job.recipes, job.out, benches=benches, balance=job.balance, fresh=job.fresh)
    if isinstance(job, SequenceJob):
        bench = kept_bench(job.recipes[0])
        return sequence(job.recipes, job.out, before=job.before, bench=bench, fresh=job.fresh)
    bench = kept_bench(job.recipe)
    if job.sum_of:
        return compose(job.recipe, job.sum_of, job.out, bench=bench, fresh=job.fresh)
    if job.control_of is not None:
        return control(job.recipe, job.control_of, job.out, bench=bench, fresh=job.fresh)
    return run(job.recipe, job.out, bench=bench, fresh=job.fresh)
