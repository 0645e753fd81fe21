"""The main job on the embedded miniature: `expunge demo`.

Hazard knowledge, then toxicity, then both patches at once. Every run is an ordinary run over
ordinary files; nothing here is special but the shared benches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.errors import DataError, RecipeError
from expunge.evaluation.stats import Spread, mean_and_spread
from expunge.jobs import Job, run_jobs
from expunge.miniature import base_directory, check_data, oracle_directory
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe, check_episodes
from expunge.records import RunRecord, Score, full_name
from expunge.registry import nearest

# Chosen on the validation questions, with as many looks for each objective
# (benchmarks/demo_settings.py). RMU's published coefficient and retain weight belong to 7B models:
# with them nothing is forgotten here (LOG.md).
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cosine-rmu": {"lr": 0.005, "retain_weight": 3.0},
    "rmu": {"lr": 0.005, "retain_weight": 5.0, "objective_settings": {"coefficient": 100.0}},
    "adaptive-rmu": {"lr": 0.005, "retain_weight": 20.0},
}
# The last: of the miniature's layers it is the one to read (LOG.md).
LAYER = 7
# Chosen on validation too (LOG.md). The generated scenes want pooled probes and a strong content
# term: rudeness begins at a word that both wordings lead up to.
TOXICITY: dict[str, Any] = {
    "objective": "multi-layer-probe",
    "lr": 0.005,
    "retain_weight": 5.0,
    "probe_pooling": "mean",
    "objective_settings": {"margin": 4.0, "content_weight": 50.0},
}
# With a learned trade-off these come from the objectives' own defaults, not from a hand's choice.
LEARNED: dict[str, Any] = {
    "tradeoff": "learned",
    "lr": "auto",
    "retain_weight": None,
    "objective_settings": {},
}
# The objectives beside the first get fewer seeds, and so do sums, so that the demo stays short.
BASELINE_SEEDS = SUM_SEEDS = 3
KNOWLEDGE_NAMES = ("forget_accuracy", "retain_accuracy", "forget_nll", "retain_nll", "perplexity")
TOXICITY_NAMES = (
    "toxicity_rate",
    "expected_max_toxicity",
    "toxicity_mean",
    "fluency",
    "distinct_2",
    "neutral_nll",
    "kl_to_base",
    "perplexity",
    "detoxification",
)
SHOWN = (*KNOWLEDGE_NAMES, "toxicity_rate", "fluency", "neutral_nll", "detoxification")

Key = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Column:
    """One kind of run, over its seeds, as one function's suite measures it.

    Attributes:
        name: what was done, such as ``cosine-rmu`` or ``knowledge + toxicity``.
        records: one a seed.
    """

    name: str
    records: tuple[RunRecord, ...]

    def spread(self, name: str, scorer: str | None = None, prompts: str | None = None) -> Spread:
        """Mean, standard deviation and 95 % interval of a score over seeds."""
        scores = [
            record.score(name, "patched", scorer=scorer, prompts=prompts) for record in self.records
        ]
        return mean_and_spread([s.value for s in scores if s is not None and s.value is not None])


@dataclass(frozen=True)
class Part:
    """What one function's suite says of several kinds of runs.

    Attributes:
        names: of the scores that are shown.
        base, oracle: scores of the untouched and of the retrained model.
    """

    title: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    base: tuple[Score, ...]
    oracle: tuple[Score, ...]

    @classmethod
    def of(cls, title: str, names: tuple[str, ...], columns: Sequence[Column]) -> Part:
        """The part, with base and oracle as the first run measured them."""
        scores = columns[0].records[0].scores
        base, oracle = (
            tuple(score for score in scores if score.model == role) for role in ("base", "oracle")
        )
        return cls(title, names, tuple(columns), base, oracle)

    def keys(self) -> list[Key]:
        """All scores, in order."""
        return [score.key for name in self.names for score in self.base if score.name == name]

    def shown(self) -> list[Key]:
        """What a table has room for; of continuations, those of the first set of prompts."""
        first = next((score.prompts for score in self.base if score.prompts), None)
        return [key for key in self.keys() if key[0] in SHOWN and key[2] in (None, first)]

    def to_dict(self) -> dict[str, Any]:
        """JSON form: scores by name, or by ``name/prompts/scorer`` where there are several."""
        return {
            "base": [asdict(score) for score in self.base],
            "oracle": [asdict(score) for score in self.oracle],
            "objectives": {
                column.name: {full_name(*key): asdict(column.spread(*key)) for key in self.keys()}
                for column in self.columns
            },
            "runs": {c.name: [record.to_dict() for record in c.records] for c in self.columns},
        }


@dataclass(frozen=True)
class DemoSummary:
    """All runs of a demo.

    Attributes:
        seconds: wall time of the whole demo.
    """

    knowledge: Part
    toxicity: Part
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "seconds": self.seconds,
            "knowledge": self.knowledge.to_dict(),
            "toxicity": self.toxicity.to_dict(),
        }


def write_world(folder: Path) -> None:
    """Write the miniature's world as files.

    Raises:
        DataError: files of these names lie there among others, so they are a user's own; or the
            generated world is not the one that the shipped models were trained on.
    """
    world = check_data()
    here = {path.name for path in folder.glob("[!.]*")}
    known = set(world.contents())
    if here & known and here - known:
        raise DataError(
            what="The miniature's world would replace files of these names",
            got=f"{', '.join(sorted(here & known))} in {folder}, beside other files",
            allowed="a folder that holds nothing else",
            fix="choose another -o",
        )
    world.write(folder)


def demo_recipe(data: Path, **changes: Any) -> Recipe:
    """The recipe of a knowledge run on the miniature whose world was written to ``data``."""
    return Recipe.build(
        {
            **_common(data),
            "forget": [str(data / "forget.txt")],
            "questions": str(data / "questions.jsonl"),
            "retain_questions": str(data / "retain_questions.jsonl"),
            "layer": LAYER,
            "steps": 80,
            **changes,
        }
    )


def toxicity_recipe(data: Path, **changes: Any) -> Recipe:
    """The recipe of a toxicity run on the miniature whose world was written to ``data``."""
    return Recipe.build(
        {
            **_common(data),
            "function": "toxicity",
            "pairs": str(data / "pairs.tsv"),
            "prompts": str(data / "prompts.jsonl"),
            "retain_questions": str(data / "all_questions.jsonl"),
            "scorers": [f"words:{data / 'words.txt'}", "tfidf"],
            "max_prompts": 80,
            "samples": 2,
            "steps": 60,
            "max_texts": 700,
            **TOXICITY,
            **changes,
        }
    )


def _common(data: Path) -> dict[str, Any]:
    return {
        "model": _from_here(base_directory()),
        "oracle": _from_here(oracle_directory()),
        "retain": [str(data / "retain.txt")],
        "text": str(data / "benign.txt"),
        "max_tokens": 128,
        "batch_size": 8,
    }


def _from_here(path: Path) -> str:
    """A path as a user would type it: records are shared, and say nothing of the machine."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def demo(
    out: Path,
    *,
    seeds: int = 5,
    tradeoff: str = "fixed",
    episodes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> DemoSummary:
    """Unlearn either function, and both at once; a run directory each.

    Args:
        out: where the run directories and the data go.
        seeds: of each function's own objective; the others and the sums get at most three.
        tradeoff: of either function's own objective: ``fixed``, at settings chosen by hand, or
            ``learned``, from the objective's defaults.
        episodes: of a learned trade-off; None: the recipe's default.
        workers: processes; None: one a core.
        progress: told of each finished run.
        fresh: discard earlier runs.

    Raises:
        RecipeError: another trade-off.
        DataError: the generated world is not the one that the shipped models were trained on.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    main = _main_settings(tradeoff, episodes)
    write_world(out / "data")
    jobs = _jobs(out, seeds, fresh, main)
    flat = [job for batch in jobs.values() for job in batch]
    done = iter(run_jobs(flat, workers=workers, progress=progress))
    columns = {key: Column(key[1], tuple(next(done) for _ in batch)) for key, batch in jobs.items()}
    knowledge, toxicity = (
        [column for key, column in columns.items() if key[0] == function]
        for function in ("knowledge", "toxicity")
    )
    how = ", learned trade-off" if main else ""
    return DemoSummary(
        Part.of(f"Hazard knowledge on the miniature{how}", KNOWLEDGE_NAMES, knowledge),
        Part.of(f"Toxicity on the miniature{how}", TOXICITY_NAMES, toxicity),
        time.perf_counter() - start,
    )


def _main_settings(tradeoff: str, episodes: int | None) -> dict[str, Any]:
    """What the main runs have in place of the settings chosen by hand; nothing for ``fixed``."""
    if tradeoff == "learned":
        return LEARNED | ({} if episodes is None else {"episodes": episodes})
    if tradeoff != "fixed":
        raise RecipeError(
            what="The demo has no such trade-off",
            got=repr(tradeoff),
            allowed="fixed, learned",
            fix=nearest(tradeoff, ("fixed", "learned")),
        )
    check_episodes(episodes, tradeoff)
    return {}


def _jobs(
    out: Path, seeds: int, fresh: bool, main: dict[str, Any]
) -> dict[tuple[str, str], list[Job]]:
    """(function that measures, what was done) -> a job for each seed; long ones first.

    Args:
        main: settings of the main runs that differ.
    """
    recipe, manners = demo_recipe(out / "data"), toxicity_recipe(out / "data")
    first, *others = OBJECTIVES
    few = range(min(seeds, BASELINE_SEEDS))
    jobs: dict[tuple[str, str], list[Job]] = {}
    for name in (first, *others):
        settings = {"objective": name, **OBJECTIVES[name], **(main if name == first else {})}
        jobs["knowledge", name] = [
            Job(recipe.updated(seed=seed, **settings), out / f"{name}-seed{seed}", fresh)
            for seed in (range(seeds) if name == first else few)
        ]
    probes = str(manners.objective)
    jobs["toxicity", probes] = [
        Job(manners.updated(seed=seed, **main), out / f"{probes}-seed{seed}", fresh)
        for seed in range(seeds)
    ]
    sums = range(min(seeds, SUM_SEEDS))
    for function, measured in (("toxicity", manners), ("knowledge", recipe)):
        jobs[function, "knowledge + toxicity"] = [
            Job(
                measured.updated(seed=seed),
                out / f"sum-{function}-seed{seed}",
                fresh,
                (out / f"{first}-seed{seed}", out / f"{probes}-seed{seed}"),
            )
            for seed in sums
        ]
    jobs["knowledge", probes] = [
        Job(
            recipe.updated(seed=seed),
            out / f"{probes}-knowledge-seed{seed}",
            fresh,
            (out / f"{probes}-seed{seed}",),
        )
        for seed in sums
    ]
    return jobs
