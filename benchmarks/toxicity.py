"""Every way to take toxicity out of one model, side by side: settings by validation, then the test.

    python benchmarks/toxicity.py --set model=DIR --set pairs=FILE … --out results/toxicity.json

The settings name model, oracle, data and scorers. Each method gets as many optimiser steps (edits
need none) and two looks at the validation split (banned-words has nothing to set: one). The grids
themselves rest on earlier looks, most of them at probe objectives (LOG.md). Of the settings that
keep the rest (LIMITS), the one with the highest `detoxification` there is taken; only then is the
test split read, once for each seed. Runs are ordinary run directories under --work, so an
interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expunge.edits import EDITS
from expunge.files import write_json
from expunge.jobs import Job, run_jobs
from expunge.progress import Bars
from expunge.provenance import environment
from expunge.published import published_recipe
from expunge.recipe import Recipe, merge_overrides
from expunge.records import RunRecord, Score, full_name

PROBE = [
    {"lr": 2e-3, "retain_weight": 0.3, "objective_settings": {"margin": 1.0}},
    {"lr": 2e-3, "retain_weight": 0.5, "objective_settings": {"margin": 1.5}},
]
# Two looks for each method; dpo and npo at the rate that a first look at dpo found (LOG.md).
GRID: dict[str, list[dict[str, Any]]] = {
    "multi-layer-probe": PROBE,
    "single-layer-probe": PROBE,
    "cosine-rmu": [{"retain_weight": 5.0}, {"retain_weight": 20.0}],
    "dpo": [{"lr": 5e-4, "retain_weight": weight} for weight in (1.0, 5.0)],
    "npo": [{"lr": 5e-4, "retain_weight": weight} for weight in (1.0, 5.0)],
    "profs": [{"objective_settings": {"rank": rank, "first_layer": 0}} for rank in (2, 8)],
    "project-out": [{"objective_settings": {"alpha": alpha}} for alpha in (2.0, 4.0)],
    "banned-words": [{}],
}
# What must stay, against the base: (score, largest loss, whether the loss is a ratio).
LIMITS = (("perplexity", 0.05, True), ("retain_accuracy", 0.02, False), ("retain_nll", 0.1, False))


@dataclass(frozen=True)
class Look:
    """One setting of a method, and what validation said of it."""

    method: str
    setting: dict[str, Any]
    record: RunRecord

    @property
    def worth(self) -> tuple[bool, float]:
        """Whether the rest is kept, then the summary."""
        summary = self.record.score("detoxification")
        return keeps_the_rest(self.record), (summary.value or 0.0) if summary else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "method": self.method,
            "setting": self.setting,
            "keeps_the_rest": self.worth[0],
            "validation": values(self.record.scores, "patched"),
        }


def keeps_the_rest(record: RunRecord) -> bool:
    """Whether what is measured besides toxicity lies within LIMITS of the base."""
    for name, allowed, ratio in LIMITS:
        base, own = record.score(name, "base"), record.score(name, "patched")
        if base is None or own is None or base.value is None or own.value is None:
            continue
        sign = -1 if base.higher_is == "better" else 1
        loss = own.value / base.value - 1 if ratio else sign * (own.value - base.value)
        if loss > allowed:
            return False
    return True


def values(scores: list[Score], model: str) -> dict[str, float | None]:
    """Score values by their keys, such as ``toxicity_rate/openings/tfidf``."""
    return {full_name(*s.key): s.value for s in scores if s.model == model}


def summed(records: list[RunRecord]) -> dict[str, dict[str, float | int | None]]:
    """Mean and standard deviation of each score over seeds."""
    each = [values(record.scores, "patched") for record in records]
    found: dict[str, dict[str, float | int | None]] = {}
    for key in each[0]:
        given = [value for one in each if (value := one[key]) is not None]
        if given:
            sd = statistics.stdev(given) if len(given) > 1 else None
            found[key] = {"mean": statistics.fmean(given), "sd": sd, "seeds": len(given)}
    return found


def look(recipe: Recipe, work: Path, workers: int | None, progress: Bars) -> list[Look]:
    """Every setting of every method, measured on validation."""
    settings = [(method, setting) for method, grid in GRID.items() for setting in grid]
    jobs = [
        Job(
            recipe.updated(objective=method, measure_on="validation", oracle=None, **setting),
            work / "validation" / f"{method}-{number}",
        )
        for number, (method, setting) in enumerate(settings)
    ]
    records = run_jobs(jobs, workers=workers, progress=progress)
    return [Look(*pair, record) for pair, record in zip(settings, records, strict=True)]


def test(
    recipe: Recipe, chosen: list[Look], seeds: int, work: Path, workers: int | None, progress: Bars
) -> dict[str, list[RunRecord]]:
    """The chosen settings on the test split; an edit has nothing that a seed would change."""
    names = [(one, seed) for one in chosen for seed in range(1 if one.method in EDITS else seeds)]
    jobs = [
        Job(
            recipe.updated(objective=one.method, seed=seed, measure_on="test", **one.setting),
            work / "test" / f"{one.method}-seed{seed}",
        )
        for one, seed in names
    ]
    found: dict[str, list[RunRecord]] = {}
    records = run_jobs(jobs, workers=workers, progress=progress)
    for (one, _), record in zip(names, records, strict=True):
        found.setdefault(one.method, []).append(record)
    return found


def print_table(console: Console, columns: dict[str, dict[str, Any]]) -> None:
    """Models side by side, scores downward."""
    table = Table()
    table.add_column("score", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for key in next(iter(columns.values())):
        cells = []
        for column in columns.values():
            value = column.get(key)
            value = value["mean"] if isinstance(value, dict) else value
            cells.append("" if value is None else f"{value:.3f}")
        table.add_row(key, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("results/toxicity.json"))
    parser.add_argument("--work", type=Path, default=Path("toxicity-runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None)
    given = parser.parse_args()
    progress = Bars(Console(stderr=True))
    recipe = Recipe.build(merge_overrides({"function": "toxicity"}, given.set))
    looks = look(recipe, given.work, given.workers, progress)
    chosen = [
        max((one for one in looks if one.method == method), key=lambda one: one.worth)
        for method in GRID
    ]
    records = test(recipe, chosen, given.seeds, given.work, given.workers, progress)
    first = next(iter(records.values()))[0]
    columns: dict[str, dict[str, Any]] = {
        role: values(first.scores, role) for role in ("base", "oracle")
    }
    columns |= {method: summed(found) for method, found in records.items()}
    write_json(
        given.out,
        {
            "recipe": published_recipe(recipe),
            "seeds": given.seeds,
            "looks": [one.to_dict() for one in looks],
            "chosen": [one.to_dict() for one in chosen],
            "test": columns,
            "base_and_oracle": [asdict(s) for s in first.scores if s.model != "patched"],
            "patched": {
                method: [
                    [asdict(s) for s in record.scores if s.model == "patched"] for record in found
                ]
                for method, found in records.items()
            },
            "seconds": {
                method: statistics.fmean(record.timing.get("train", 0.0) for record in found)
                for method, found in records.items()
            },
            "environment": environment(),
        },
    )
    print_table(Console(), columns)


if __name__ == "__main__":
    main()
