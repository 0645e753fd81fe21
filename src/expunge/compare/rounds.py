"""`expunge compare`: runs what a comparison plans, and computes what it says.

Rounds of jobs, each resumable by itself: the searches behind the settings; the runs of all seeds
with what rests on their patches, random controls and two functions at once; then the statistics.
A run whose training diverged leaves a record that says so, and counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expunge.compare.plan import CONTROL, ComparisonPlan, settled
from expunge.comparison import DIVERGED, Comparison, Place
from expunge.comparison.cells import is_choice
from expunge.errors import DataError, DivergedError, ExpungeError
from expunge.files import write_json
from expunge.jobs import AnyJob, Job, JointJob, SequenceJob, Workers, default_workers
from expunge.learning import method_of
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RECORD_NAME, RunRecord

COMPARISON_NAME = "comparison.json"

Key = tuple[str, str]
"""(function, method)"""


@dataclass
class Comparing:
    """One comparison in its folder: ``FUNCTION/METHOD/choice``, ``FUNCTION/METHOD/seedN``."""

    plan: ComparisonPlan
    out: Path
    workers: int | None = None
    progress: Progress = field(default_factory=Silent)
    fresh: bool = False
    ray: bool = False

    def run(self) -> Comparison:
        """All rounds; what was finished before is not done again."""
        workers = default_workers(len(self.plan.methods)) if self.workers is None else self.workers
        with Workers(workers, progress=self.progress, ray=self.ray) as hands:
            searches, chosen = self._choose(hands)
            jobs = [*self._seeds(chosen), *self._controls(), *self._together(chosen)]
            records = [*searches, *self._done(hands, jobs), *self._unchosen(chosen)]
        expected = [
            Place(method, function, seed)
            for function in self.plan.functions
            for method in self.plan.methods
            for seed in range(self.plan.seeds)
        ]
        found = Comparison.of(_of_cells(records), own=self.plan.own, expected=expected)
        write_json(self.out / COMPARISON_NAME, found.to_dict())
        return found

    def folder(self, function: str, method: str, name: str) -> Path:
        """Where a run lies."""
        return self.out / function / re.sub(r"\W+", "-", method).strip("-") / name

    def _choose(self, hands: Workers) -> tuple[list[RunRecord], dict[Key, Recipe | RunRecord]]:
        """The searches; what each cell's seeds train with, or the record of one that failed."""
        chosen: dict[Key, Recipe | RunRecord] = {}
        jobs: dict[Key, Job] = {}
        for function in self.plan.functions:
            for method in self.plan.methods:
                search = self.plan.choice(function, method)
                if search is not None:
                    out = self.folder(function, method, "choice")
                    jobs[function, method] = Job(search, out, self.fresh)
                elif method != CONTROL:
                    chosen[function, method] = self.plan.recipe(function, method)
        searches = self._done(hands, list(jobs.values()))
        for key, record in zip(jobs, searches, strict=True):
            own = self.plan.recipe(*key)
            chosen[key] = (
                record if _diverged(record) else settled(own, jobs[key].out, record.training)
            )
        return [one for one in searches if not _diverged(one)], chosen

    def _seeds(self, chosen: dict[Key, Recipe | RunRecord]) -> list[Job]:
        return [
            Job(
                # Probes take their time, and tell of the objective more than of the seed.
                recipe.updated(seed=seed, measure_probes=seed == 0),
                self.folder(*key, f"seed{seed}"),
                self.fresh,
            )
            for key, recipe in chosen.items()
            if isinstance(recipe, Recipe)
            for seed in range(self.plan.seeds)
        ]

    def _unchosen(self, chosen: dict[Key, Recipe | RunRecord]) -> list[RunRecord]:
        """For each seed of a cell whose search found nothing, that search's record."""
        return [
            diverged_record(self.plan.recipe(*key).updated(seed=seed), str(_diverged(found)))
            for key, found in chosen.items()
            if isinstance(found, RunRecord)
            for seed in range(self.plan.seeds)
        ]

    def _controls(self) -> list[Job]:
        """A random change as large as that of each function's own objective, seed by seed."""
        if CONTROL not in self.plan.methods:
            return []
        return [
            Job(
                self.plan.recipe(function, own).updated(seed=seed),
                self.folder(function, CONTROL, f"seed{seed}"),
                self.fresh,
                control_of=self.folder(function, own, f"seed{seed}"),
            )
            for function, own in self._own().items()
            for seed in range(self.plan.seeds)
        ]

    def _together(self, chosen: dict[Key, Recipe | RunRecord]) -> list[AnyJob]:
        """All functions from one model, by their own objectives, measured on each function."""
        own = self._own()
        recipes = [chosen[key] for key in own.items()]
        if len(own) < 2 or not all(isinstance(one, Recipe) for one in recipes):
            return []
        jobs: list[AnyJob] = []
        for seed in range(min(self.plan.interference_seeds, self.plan.seeds)):
            seeded = [
                one.updated(seed=seed, tradeoff="fixed")
                for one in recipes
                if isinstance(one, Recipe)
            ]
            parts = tuple(self.folder(*key, f"seed{seed}") for key in own.items())
            there, back = (
                self._trained(name, seed) for name in ("one-after-the-other", "reversed")
            )
            joint = self._trained("joint", seed)
            jobs += [
                JointJob(tuple(seeded), joint, self.fresh),
                SequenceJob(tuple(seeded), there, self.fresh),
                SequenceJob(tuple(reversed(seeded)), back, self.fresh),
            ]
            for name, folders in {
                "sum": parts,
                **{p.parent.name: (p,) for p in (joint, there, back)},
            }.items():
                jobs += [
                    Job(
                        recipe,
                        self.out / "together" / f"{name}-{recipe.function}" / f"seed{seed}",
                        self.fresh,
                        sum_of=folders,
                    )
                    for recipe in seeded
                ]
        return jobs

    def _trained(self, name: str, seed: int) -> Path:
        return self.out / "together" / name / f"seed{seed}"

    def _own(self) -> dict[str, str]:
        """function -> the objective made for it, for the functions that are compared."""
        return {name: self.plan.own[name] for name in self.plan.functions if name in self.plan.own}

    def _done(self, hands: Workers, jobs: Sequence[AnyJob]) -> list[RunRecord]:
        """The jobs' records; those that diverged say so, and are not tried again."""
        known = {} if self.fresh else {job.out: _known_to_diverge(job) for job in jobs}
        left = [job for job in jobs if known.get(job.out) is None]
        found = hands.do(left, _rescued)
        done = {job.out: record for job, record in zip(left, found, strict=True)}
        return [known.get(job.out) or done[job.out] for job in jobs]


def diverged_record(recipe: Recipe, reason: str) -> RunRecord:
    """The record of a run that came to nothing: no scores, and why."""
    return RunRecord(
        function=recipe.function,
        objective=method_of(recipe).name,
        seed=recipe.seed,
        timing={},
        peak_memory_bytes=0,
        provenance={"recipe": recipe.model_dump(mode="json", exclude_none=True)},
        training={DIVERGED: reason},
    )


def _of_cells(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Without what was trained jointly or in sequence and is measured by others."""
    return [one for one in records if one.scores or _diverged(one) or is_choice(one)]


def _diverged(record: RunRecord) -> str | None:
    reason = record.training.get(DIVERGED)
    return None if reason is None else str(reason)


def _rescued(job: AnyJob, error: ExpungeError) -> RunRecord | None:
    """The record of a run that diverged, kept in its folder; None for any other error."""
    if not isinstance(job, Job):
        return None
    if isinstance(error, DivergedError):
        reason = f"{error.what} ({error.got})"
    elif any(_diverged(record) for record in map(_record_in, job.waits_for) if record):
        reason = "what it rests on diverged"
    else:
        return None
    record = diverged_record(job.recipe, reason)
    record.save(job.out)
    return record


def _known_to_diverge(job: AnyJob) -> RunRecord | None:
    """The record of an earlier try of the same recipe that diverged."""
    record = _record_in(job.out)
    if record is None or not isinstance(job, Job):
        return None
    same = record.provenance.get("recipe") == job.recipe.model_dump(mode="json", exclude_none=True)
    return record if same and _diverged(record) else None


def _record_in(folder: Path) -> RunRecord | None:
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        return RunRecord.load(folder)
    except DataError:
        return None  # the run itself tells what is wrong with it
