"""The learned trade-off against every fixed setting of a grid, each a run of full length.

    python benchmarks/grid.py --set model=DIR --set forget=… --out results/grid_lab7m.json

Five learning rates by four retain weights, evenly over the ranges that a policy moves in (other
knobs stay as usual). Of each run the point that validation prefers is measured on the test split,
as learned is. Cells are processes that share nothing; finished ones lie under --work, by recipe and
commit.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from expunge.files import write_json
from expunge.metalearning.choosing import settle
from expunge.metalearning.exploring import archive_of
from expunge.metalearning.playing import Episodes
from expunge.metalearning.searching import constant
from expunge.processes import process_pool
from expunge.progress import Bars
from expunge.provenance import environment
from expunge.published import published_recipe
from expunge.recipe import Recipe
from expunge.workbench import Workbench
from tradeoff import cell, folder_of, points_on_test, recipe_of, work

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
WEIGHTS = (0.2, 0.4, 0.6, 0.8)


def fixed_cell(bench: Workbench, recipe: Recipe, rate: float, weight: float) -> dict[str, Any]:
    """One run that holds its knobs, the others as usual: what validation prefers, on test."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        learning = bench.learning
        archive = archive_of(learning, recipe, Path(name), recipe.front_size)
        archive.fallback = None
        episodes = Episodes(learning, recipe, archive)
        usual = {scale.knob.name: scale.start_share for scale in episodes.scales}
        shares = {**usual, "lr": rate, "retain_weight": weight}
        played, _ = episodes.play(constant(episodes.scales, shares), 0, steps=recipe.steps)
        settle(episodes, archive)
        archive.entries = [archive.best]
        test = points_on_test(learning, episodes)[0]
        best = archive.best
    return {
        "method": f"lr {played.knobs[0]['lr']:.2g}, retain {played.knobs[0]['retain_weight']:.2g}",
        "knobs": played.knobs[0],
        "validation": {"chosen": best.worth},
        "test": {"chosen": archive.worth(test), "points": [list(test)]},
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--function", choices=("knowledge", "toxicity", "own"), default="own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/grid"))
    given = parser.parse_args()
    recipe = recipe_of(given.function, given.work / "data", given.set)
    recipe = recipe.updated(seed=given.seed, tradeoff="learned")
    origin = environment()
    folder = folder_of(given.work, recipe, origin["commit"])
    makers = [
        partial(cell, method="learned"),
        *(partial(fixed_cell, rate=r, weight=w) for r, w in itertools.product(RATES, WEIGHTS)),
    ]
    with (
        process_pool(given.workers) as pool,
        Bars(Console(stderr=True)).phase("cells", len(makers)) as advance,
    ):
        futures = [
            pool.submit(work, recipe, make, folder / f"{number:02d}.json")
            for number, make in enumerate(makers)
        ]
        cells = []
        for future in futures:
            cells.append(future.result())
            advance(1, cells[-1]["method"])
    learned, *fixed = cells
    by_validation = max(fixed, key=lambda one: one["validation"]["chosen"])
    by_test = max(fixed, key=lambda one: one["test"]["chosen"])
    told = {
        "learned": learned["test"]["chosen"],
        "grid, chosen on validation": by_validation["test"]["chosen"],
        "grid, best on test": by_test["test"]["chosen"],
        "better than": sum(learned["test"]["chosen"] > one["test"]["chosen"] for one in fixed),
        "of": len(fixed),
    }
    write_json(
        given.out,
        {
            "recipe": published_recipe(recipe),
            "told": told,
            "learned": learned,
            "fixed": fixed,
            "environment": origin,
        },
    )
    print(told)


if __name__ == "__main__":
    main()
