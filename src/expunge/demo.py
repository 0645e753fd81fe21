"""The main job on the embedded miniature: `expunge demo`.

Every run is an ordinary run over ordinary files; nothing here is special but the shared bench.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.evaluation.stats import Spread, mean_and_spread
from expunge.jobs import Job, run_jobs
from expunge.miniature import base_directory, check_data, oracle_directory
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RunRecord, Score

# Chosen on the validation questions, with as many looks for each objective
# (benchmarks/demo_settings.py). RMU's published coefficient and retain weight belong to 7B models:
# with them nothing is forgotten here (LOG.md).
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cosine-rmu": {"lr": 0.005, "retain_weight": 3.0},
    "rmu": {"lr": 0.005, "retain_weight": 5.0, "objective_settings": {"coefficient": 100.0}},
    "adaptive-rmu": {"lr": 0.005, "retain_weight": 20.0},
}
# The objectives beside the first get fewer seeds, so that the demo stays below a minute.
BASELINE_SEEDS = 3
NAMES = ("forget_accuracy", "retain_accuracy", "forget_nll", "retain_nll", "perplexity")


@dataclass(frozen=True)
class DemoSummary:
    """All runs of a demo.

    Attributes:
        runs: objective -> its records, one a seed.
        base, oracle: scores of the untouched and of the retrained model.
        seconds: wall time of the whole demo.
    """

    runs: dict[str, list[RunRecord]]
    base: list[Score]
    oracle: list[Score]
    seconds: float

    def spread(self, objective: str, name: str) -> Spread:
        """Mean, standard deviation and 95 % interval of a score over seeds."""
        scores = [record.score(name, "patched") for record in self.runs[objective]]
        return mean_and_spread([s.value for s in scores if s is not None and s.value is not None])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "seconds": self.seconds,
            "base": [asdict(score) for score in self.base],
            "oracle": [asdict(score) for score in self.oracle],
            "objectives": {
                objective: {name: asdict(self.spread(objective, name)) for name in NAMES}
                for objective in self.runs
            },
            "runs": {k: [record.to_dict() for record in v] for k, v in self.runs.items()},
        }


def demo_recipe(data: Path, **changes: Any) -> Recipe:
    """The recipe of a run on the miniature whose world was written to ``data``."""
    return Recipe.build(
        {
            "model": _from_here(base_directory()),
            "oracle": _from_here(oracle_directory()),
            "forget": [str(data / "forget.txt")],
            "retain": [str(data / "retain.txt")],
            "questions": str(data / "questions.jsonl"),
            "retain_questions": str(data / "retain_questions.jsonl"),
            "text": str(data / "benign.txt"),
            "max_tokens": 128,
            "steps": 80,
            "batch_size": 8,
            **changes,
        }
    )


def _from_here(path: Path) -> str:
    """A path as a user would type it: records are shared, and say nothing of the machine."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def demo(
    out: Path,
    *,
    seeds: int = 5,
    workers: int | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> DemoSummary:
    """Run the first objective for every seed, the others for some; a run directory each.

    Args:
        out: where the run directories and the data go.
        seeds: of the first objective; the others get at most ``BASELINE_SEEDS``.
        workers: processes; None: one a core.
        progress: told of each finished run.
        fresh: discard earlier runs.

    Raises:
        DataError: the generated world is not the one that the shipped models were trained on.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    check_data().write(out / "data")
    recipe = demo_recipe(out / "data")
    first, *others = OBJECTIVES
    names = [(first, seed) for seed in range(seeds)]
    names += [(name, seed) for name in others for seed in range(min(seeds, BASELINE_SEEDS))]
    jobs = [
        Job(
            recipe.updated(objective=name, seed=seed, **OBJECTIVES[name]),
            out / f"{name}-seed{seed}",
            fresh,
        )
        for name, seed in names
    ]
    records = run_jobs(jobs, workers=workers, progress=progress)
    runs: dict[str, list[RunRecord]] = {name: [] for name in OBJECTIVES}
    for (name, _), record in zip(names, records, strict=True):
        runs[name].append(record)
    scores = records[0].scores
    return DemoSummary(
        runs,
        [score for score in scores if score.model == "base"],
        [score for score in scores if score.model == "oracle"],
        time.perf_counter() - start,
    )
