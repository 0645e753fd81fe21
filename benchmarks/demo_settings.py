"""How the demo's settings were chosen: a small grid for each objective, on validation alone.

    python benchmarks/demo_settings.py --out results/demo_settings.json

Every objective gets the same number of looks. Of the settings whose mean retain accuracy stays
within 0.01 of the base and whose perplexity within 2 %, the one with the lowest mean forget
accuracy on the validation questions is taken; the test questions are not read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from expunge.demo import demo_recipe
from expunge.files import write_json
from expunge.miniature import check_data
from expunge.progress import Bars
from expunge.provenance import environment
from expunge.recipe import Recipe
from expunge.workbench import Workbench

RATES = (5e-3, 1e-2)
GRID: dict[str, list[dict[str, Any]]] = {
    "cosine-rmu": [{"retain_weight": w} for w in (1.0, 2.0, 3.0, 5.0, 10.0)],
    "rmu": [
        {"retain_weight": w, "objective_settings": {"coefficient": 100.0}}
        for w in (1.0, 2.0, 5.0, 20.0, 80.0)
    ],
    "adaptive-rmu": [{"retain_weight": w} for w in (5.0, 10.0, 20.0, 100.0, 400.0)],
}


def means(bench: Workbench, recipe: Recipe, seeds: int) -> dict[str, float]:
    """Mean validation scores of a setting over seeds."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        patch, _ = bench.train(recipe.updated(seed=seed))
        for score in bench.evaluate(patch, split="validation"):
            if score.model == "patched" and score.value is not None:
                found.setdefault(score.name, []).append(score.value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/demo_settings.json"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    progress = Bars(Console(stderr=True))
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        check_data().write(data)
        recipe = demo_recipe(data)
        bench = Workbench(recipe)
        base = {s.name: s.value or 0.0 for s in bench.evaluate(None, split="validation")}
        rows: list[dict[str, Any]] = []
        settings = [
            {"objective": objective, "lr": lr, **setting}
            for objective, grid in GRID.items()
            for setting in grid
            for lr in RATES
        ]
        with progress.phase("settings", len(settings)) as advance:
            for setting in settings:
                scores = means(bench, recipe.updated(**setting), given.seeds)
                rows.append({**setting, "validation": scores})
                advance(1, f"{setting['objective']} {scores['forget_accuracy']:.3f}")
    chosen = {}
    for objective in GRID:
        fit = [
            row
            for row in rows
            if row["objective"] == objective
            and row["validation"]["retain_accuracy"] >= base["retain_accuracy"] - 0.01
            and row["validation"]["perplexity"] <= base["perplexity"] * 1.02
        ]
        chosen[objective] = min(fit, key=lambda row: row["validation"]["forget_accuracy"])
    write_json(
        given.out,
        {
            "command": f"python benchmarks/demo_settings.py --seeds {given.seeds}",
            "base": base,
            "rows": rows,
            "chosen": chosen,
            "environment": environment(),
        },
    )
    for row in chosen.values():
        print(row)


if __name__ == "__main__":
    main()
