"""`expunge compare`: runs what a comparison plans, and computes what it says.

Rounds of jobs, each resumable by itself: the searches behind the settings; the runs of all seeds
with what rests on their patches, random controls and two functions at once; then the statistics.
A run whose training diverged leaves a record that says so, and counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from expunge.compare.plan import ComparisonPlan, settled
from expunge.comparison import DIVERGED, Comparison, Place
from expunge.comparison.cells import is_choice
from expunge.errors import DataError, DivergedError, ExpungeError
from expunge.files import write_json
from expunge.folder import RECIPE_NAME, look, make_way
from expunge.jobs import AnyJob, Job, JointJob, SequenceJob, Workers, default_workers
from expunge.learning import method_of
from expunge.model.control import CONTROL
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RECORD_NAME, RunRecord

COMPARISON_NAME = "comparison.json"
RESTS = "what it rests on diverged"

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
        cells = len(self.plan.methods) * len(self.plan.functions)
        workers = default_workers(cells * self.plan.seeds) if self.workers is None else self.workers
        with Workers(workers, progress=self.progress, ray=self.ray) as hands:
            searches, chosen = self._choose(hands)
            # They come before the controls, which look for what they rest on.
            records = [*searches, *self._unchosen(chosen)]
            jobs = [*self._seeds(chosen), *self._controls()]
            together = self._together(chosen)
            if self._all_chosen(chosen):
                jobs += together
            else:
                records += self._given_up(together)
            records += self._done(hands, jobs)
        expected = [
            Place(method, function, seed)
            for function in self.plan.functions
            for method in self.plan.methods
            for seed in self.plan.seeds_run
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

    def _seeds(self, chosen: dict[Key, Recipe | RunRecord]) -> list[AnyJob]:
        return [
            self._seed(key, recipe, seed)
            for key, recipe in chosen.items()
            if isinstance(recipe, Recipe)
            for seed in self.plan.seeds_run
        ]

    def _seed(self, key: Key, recipe: Recipe, seed: int) -> Job:
        # Probes take their time, and tell of the objective more than of the seed. Which seed has
        # them must not hang on the plan, or finished runs would be others'.
        seeded = recipe.updated(seed=seed, measure_probes=seed == 0)
        return Job(seeded, self.folder(*key, f"seed{seed}"), self.fresh)

    def _unchosen(self, chosen: dict[Key, Recipe | RunRecord]) -> list[RunRecord]:
        """The records of cells whose search found nothing, each seed's in its folder."""
        return [
            self._lost(self._seed(key, self.plan.recipe(*key), seed), str(_diverged(found)))
            for key, found in chosen.items()
            if isinstance(found, RunRecord)
            for seed in self.plan.seeds_run
        ]

    def _all_chosen(self, chosen: dict[Key, Recipe | RunRecord]) -> bool:
        return all(isinstance(chosen[key], Recipe) for key in self._own().items())

    def _given_up(self, jobs: Sequence[AnyJob]) -> list[RunRecord]:
        """What is measured of several functions at once, where one of them has no settings."""
        alone = [
            self._seed(key, self.plan.recipe(*key), seed)
            for key in self._own().items()
            for seed in self.plan.seeds_run
        ]
        made_by = {job.out: job for job in (*alone, *jobs)}
        measured = [job for job in jobs if isinstance(job, Job)]
        return [self._lost(job, f"{RESTS}: a search found nothing", made_by) for job in measured]

    def _lost(
        self, job: Job, reason: str, made_by: Mapping[Path, AnyJob] | None = None
    ) -> RunRecord:
        known = None if self.fresh else _known_to_diverge(job)
        if known is None:
            if not self.fresh:
                look(job.recipe, job.out)  # refuses another run's folder
            make_way(job.out, fresh=self.fresh)
            known = _kept(job, reason, made_by or {})
        return known

    def _controls(self) -> list[AnyJob]:
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
            for seed in self.plan.seeds_run
        ]

    def _together(self, chosen: dict[Key, Recipe | RunRecord]) -> list[AnyJob]:
        """All functions from one model, by their own objectives, measured on each function."""
        own = self._own()
        if len(own) < 2:
            return []
        found = {key: chosen[key] for key in own.items()}
        recipes = [
            one if isinstance(one, Recipe) else self.plan.recipe(*key) for key, one in found.items()
        ]
        jobs: list[AnyJob] = []
        for seed in self.plan.seeds_run[: self.plan.interference_seeds]:
            seeded = [one.updated(seed=seed, tradeoff="fixed") for one in recipes]
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
        found = hands.do(left, partial(_rescued, {job.out: job for job in jobs}))
        done = {job.out: record for job, record in zip(left, found, strict=True)}
        return [known.get(job.out) or done[job.out] for job in jobs]


def diverged_record(job: AnyJob, reason: str, made_by: Mapping[Path, AnyJob]) -> RunRecord:
    """The record of a run that came to nothing: no scores, and why.

    Args:
        made_by: folder -> the job behind it, for what a sum rests on.
    """
    function, objective = _origin(job, made_by)
    return RunRecord(
        function=function,
        objective=objective,
        seed=job.recipe.seed if isinstance(job, Job) else job.recipes[0].seed,
        timing={},
        peak_memory_bytes=0,
        provenance=_provenance(job),
        training={DIVERGED: reason},
    )


def _origin(job: AnyJob, made_by: Mapping[Path, AnyJob]) -> tuple[str, str]:
    """Function and objective, as the record would name them."""
    if isinstance(job, Job):
        if job.control_of is not None:
            return job.recipe.function, CONTROL
        parts = [_origin(made_by[path], made_by) for path in job.sum_of]
        if not parts:
            return job.recipe.function, method_of(job.recipe).name
        functions, objectives = zip(*parts, strict=True)
        return " + ".join(functions), " + ".join(objectives)
    names = [method_of(recipe).name for recipe in job.recipes]
    method = f"joint({', '.join(names)})" if isinstance(job, JointJob) else " then ".join(names)
    return " + ".join(sorted(recipe.function for recipe in job.recipes)), method


def _provenance(job: AnyJob) -> dict[str, Any]:
    if isinstance(job, Job):
        return {"recipe": job.recipe.model_dump(mode="json", exclude_none=True)}
    return {"recipes": [one.model_dump(mode="json", exclude_none=True) for one in job.recipes]}


def _of_cells(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Without what was trained jointly or in sequence and is measured by others."""
    alone = [record for record in records if "recipe" in record.provenance]
    return [one for one in alone if one.scores or _diverged(one) or is_choice(one)]


def _diverged(record: RunRecord) -> str | None:
    reason = record.training.get(DIVERGED)
    return None if reason is None else str(reason)


def _rescued(made_by: Mapping[Path, AnyJob], job: AnyJob, error: ExpungeError) -> RunRecord | None:
    """The record of a run that diverged, kept in its folder; None for any other error."""
    if isinstance(error, DivergedError):
        reason = f"{error.what} ({error.got})"
    elif any(_diverged(record) for record in map(_record_in, job.waits_for) if record):
        reason = RESTS
    else:
        return None
    return _kept(job, reason, made_by)


def _kept(job: AnyJob, reason: str, made_by: Mapping[Path, AnyJob]) -> RunRecord:
    """A diverged run's record in its folder, beside its recipe, so that no other run goes there."""
    record = diverged_record(job, reason, made_by)
    if isinstance(job, Job):
        job.recipe.save(job.out / RECIPE_NAME)
    record.save(job.out)
    return record


def _known_to_diverge(job: AnyJob) -> RunRecord | None:
    """The record of an earlier try of the same recipes that diverged."""
    record = _record_in(job.out)
    if record is None or not _diverged(record):
        return None
    return record if record.provenance == _provenance(job) else None


def _record_in(folder: Path) -> RunRecord | None:
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        return RunRecord.load(folder)
    except DataError:
        return None  # the run itself tells what is wrong with it
