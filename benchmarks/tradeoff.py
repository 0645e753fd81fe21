"""The learned trade-off against fixed settings, random search and Optuna's TPE, side by side.

    python benchmarks/tradeoff.py --function knowledge --first-seed 540 --out FILE
    python benchmarks/tradeoff.py --function toxicity --first-seed 520 --out FILE

Every method gets as many episodes of as many inner steps, with the same looks at validation, and a
last run of full length: learned with its policy, the searches with the knobs of their best episode,
fixed with the usual settings (its episodes differ by seed). The first episode of all is a run of
full length with the usual settings; the searches begin with these too. Seeds begin at 100: the
policy's own settings were chosen on others (LOG.md). Each keeps the front of its points; only then
is the test split read, once for each patch of a front, knowledge by accuracy. Reported are the
hypervolume of the test points and what the chosen point is worth there (`Archive.worth`), and their
paired differences over seeds; the hypervolume is the primary one. What is tried at the end, means
and scales of changes, is the same for all.

Cells are processes that share nothing; finished ones lie under --work, by recipe and commit, so an
interrupted table goes on where it stopped. (Of changes that are not committed the folder knows no
more than that there are some.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, wilcoxon

from expunge.benches import kept_bench
from expunge.demo import demo_recipe, toxicity_recipe
from expunge.evaluation.looks import LookKind, OutputLook
from expunge.evaluation.pareto import hypervolume
from expunge.files import write_json
from expunge.learning import Learning
from expunge.metalearning.choosing import settle
from expunge.metalearning.exploring import archive_of
from expunge.metalearning.looking import look_at
from expunge.metalearning.playing import Episodes
from expunge.metalearning.searching import HIGH, LOW, constant
from expunge.miniature import check_data
from expunge.model.patch import Patch
from expunge.processes import process_pool
from expunge.progress import Bars
from expunge.provenance import environment
from expunge.published import published_recipe
from expunge.recipe import Recipe, merge_overrides
from expunge.records import full_name
from expunge.training.tradeoff import Actor
from expunge.training.watch import Point
from expunge.workbench import Workbench

METHODS = ("learned", "random", "tpe", "fixed")
FIRST_SEED = 100
# With the objectives' own defaults: what the demo sets by hand is what is to be found.
KNOWLEDGE: dict[str, Any] = {"objective": "cosine-rmu", "layer": "auto"}
TOXICITY: dict[str, Any] = {"objective_settings": {}, "retain_weight": None, "lr": "auto"}


def recipe_of(function: str, data: Path, overrides: list[str]) -> Recipe:
    """The miniature's recipe of a function without anything chosen by hand, or the user's own."""
    if function == "own":
        return Recipe.build(merge_overrides({}, overrides))
    check_data().write(data)
    build = partial(demo_recipe, data, **KNOWLEDGE)
    if function == "toxicity":
        build = partial(toxicity_recipe, data, **TOXICITY)
    return Recipe.build(merge_overrides(build(oracle=None).model_dump(), overrides))


def play_learned(episodes: Episodes, count: int) -> Actor:
    """REINFORCE, as `expunge run --tradeoff learned` does it."""
    for number in range(count):
        episodes.learn(episodes.play(episodes.actor(number), number)[0])
    return episodes.policy.within(episodes.teaching)


def play_fixed(episodes: Episodes, count: int) -> Actor:
    """The usual settings, with another seed for each episode."""
    usual = episodes.policy.mean
    for number in range(count):
        seed = episodes.recipe.seed + 1000 * (number + 1)
        episodes.played.append(episodes.play(usual, number, seed=seed)[0])
    return usual


def play_search(
    episodes: Episodes,
    count: int,
    ask: Callable[[list[str], dict[str, float] | None], dict[str, float]],
    tell: Callable[[float], None],
) -> Actor:
    """A search over knobs that stay the same for a whole episode.

    Args:
        ask: (knobs, shares to begin with if any) -> shares of their ranges.
        tell: told what an episode gained.
    """
    names = [scale.knob.name for scale in episodes.scales]
    best, found = -1.0, episodes.policy.mean
    usual = {scale.knob.name: scale.start_share for scale in episodes.scales}
    episodes.played.append(episodes.play(episodes.actor(0), 0)[0])
    for number in range(1, count):
        asked = ask(names, usual if number == 1 else None)
        actor = constant(episodes.scales, asked)
        episode, _ = episodes.play(actor, number)
        episodes.played.append(episode)
        # As where a policy begins: what ended early is worth nothing.
        gained = episode.returns[0] if episode.ended == "whole" else 0.0
        tell(gained)
        if gained > best:
            best, found = gained, actor
    return found


def play_random(episodes: Episodes, count: int) -> Actor:
    """Uniform over the transformed ranges."""
    generator = np.random.default_rng([episodes.recipe.seed, 1])
    return play_search(
        episodes,
        count,
        lambda names, first: first or {n: float(generator.uniform(LOW, HIGH)) for n in names},
        lambda _reward: None,
    )


def play_tpe(episodes: Episodes, count: int) -> Actor:
    """Optuna's TPE with its defaults, over the transformed ranges."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=episodes.recipe.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    trials: list[Any] = []

    def ask(names: list[str], first: dict[str, float] | None) -> dict[str, float]:
        if first is not None:
            study.enqueue_trial(first)
        trials.append(study.ask())
        return {name: trials[-1].suggest_float(name, LOW, HIGH) for name in names}

    return play_search(episodes, count, ask, lambda reward: study.tell(trials[-1], reward))


PLAYERS = {
    "learned": play_learned,
    "random": play_random,
    "tpe": play_tpe,
    "fixed": play_fixed,
}


def cell(bench: Workbench, recipe: Recipe, method: str) -> dict[str, Any]:
    """One method, one seed: its front, chosen on validation, measured on the test split."""
    learning = bench.learning
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        archive = archive_of(learning, recipe, Path(name), recipe.front_size)
        episodes = Episodes(learning, recipe, archive)
        actor = PLAYERS[method](episodes, recipe.episodes)
        played = time.perf_counter() - start
        last, _ = episodes.play(actor, recipe.episodes, steps=recipe.steps)
        settle(episodes, archive)
        seconds = time.perf_counter() - start
        test = points_on_test(learning, episodes)
        patch = Patch.load(archive.path(archive.best))
    chosen = archive.entries.index(archive.best)
    floor = recipe.retain_floor
    return {
        "method": method,
        "seed": recipe.seed,
        "looks": episodes.kind,
        "validation": {
            "episodes": hypervolume([p for e in episodes.played for p in e.points.values()], floor),
            "front": hypervolume([e.point for e in archive.entries], floor),
            "chosen": archive.best.worth,
            "last": last.reward,
        },
        "test": {
            "front": hypervolume(test, floor),
            "chosen": archive.worth(test[chosen]),
            "points": [list(point) for point in test],
        },
        "chosen": archive.best.to_dict(),
        "scores": scores_on_test(bench, patch),
        "last_knobs": list(last.knobs),
        "inner_steps": sum(e.steps for e in episodes.played) + last.steps,
        "seconds": {"episodes": played, "all": seconds},
    }


def points_on_test(learning: Learning, episodes: Episodes) -> list[Point]:
    """The front's patches on the test split, all of its items; in the front's order.

    By accuracy where there are questions on what is to go, whatever validation was looked at by: it
    is what is reported of a model. The base was checked by the looks at validation.
    """
    recipe, archive = episodes.recipe, episodes.archive
    assert archive is not None
    whole = recipe.updated(look_items=10_000)
    asked = learning.data.measured["test"].forget_questions
    kind: LookKind = "accuracy" if asked else "likelihood"
    look = look_at(learning, whole, kind, split="test", check=False)
    assert isinstance(look, OutputLook)
    points = []
    for entry in archive.entries:
        with Patch.load(archive.path(entry)).applied(look.model):
            points.append(look())
    return points


def scores_on_test(bench: Workbench, patch: Patch) -> dict[str, dict[str, float | None]]:
    """What a run would report of the chosen patch, and of the base."""
    found: dict[str, dict[str, float | None]] = {}
    for score in bench.evaluate(patch):
        found.setdefault(score.model, {})[full_name(*score.key)] = score.value
    return found


def folder_of(work: Path, recipe: Recipe, commit: str | None) -> Path:
    """Where finished cells of a recipe lie; those that another commit's code made lie elsewhere."""
    head, changed, _ = (commit or "unknown").partition("+")
    return work / f"{recipe.fingerprint[:12]}-{head[:7]}{changed}"


MakeCell = Callable[[Workbench, Recipe], dict[str, Any]]


def work(recipe: Recipe, make: MakeCell, out: Path) -> dict[str, Any]:
    """A cell in its own process, with how its layer was found; the bench is kept for the next."""
    if not out.exists():
        bench = kept_bench(recipe)
        settled, how = bench.settled(recipe)
        write_json(out, make(bench, settled) | {"layer": settled.layer, **how})
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def compared(cells: list[dict[str, Any]], other: str, what: str) -> dict[str, Any]:
    """Learned minus another method, seed by seed: mean, 95 % bootstrap interval, Wilcoxon's p."""
    value = {(c["method"], c["seed"]): c["test"][what] for c in cells}
    seeds = sorted({c["seed"] for c in cells})
    differences = np.array([value["learned", s] - value[other, s] for s in seeds])
    result: dict[str, Any] = {"mean": float(differences.mean()), "seeds": len(seeds)}
    result["better"] = int((differences > 0).sum())
    if len(seeds) > 2 and np.ptp(differences) > 0:
        interval = bootstrap(
            (differences,), np.mean, rng=np.random.default_rng(0), n_resamples=9999
        ).confidence_interval
        result |= {"ci_low": float(interval.low), "ci_high": float(interval.high)}
        result["p"] = float(wilcoxon(differences).pvalue)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--function", choices=("knowledge", "toxicity", "own"), required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tradeoff"))
    given = parser.parse_args()
    recipe = recipe_of(given.function, given.work / "data", given.set)
    tasks = [
        (recipe.updated(seed=seed, tradeoff="learned"), method)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for method in given.methods
    ]
    folder, origin = given.work / given.function, environment()
    progress = Bars(Console(stderr=True))
    with (
        process_pool(given.workers) as pool,
        progress.phase("cells", len(tasks)) as advance,
    ):
        futures = [
            pool.submit(
                work,
                own,
                partial(cell, method=method),
                folder_of(folder, own, origin["commit"]) / f"{method}.json",
            )
            for own, method in tasks
        ]
        cells = []
        for future in futures:
            cells.append(future.result())
            last = cells[-1]
            advance(1, f"{last['method']} {last['test']['front']:.3f}")
    others = [method for method in given.methods if method != "learned"]
    means = {
        method: {
            what: statistics.fmean(c["test"][what] for c in cells if c["method"] == method)
            for what in ("front", "chosen")
        }
        for method in given.methods
    }
    differences = {
        what: {other: compared(cells, other, what) for other in others}
        for what in ("front", "chosen")
    }
    write_json(
        given.out,
        {
            "recipe": published_recipe(recipe),
            "means": means,
            "learned_minus": differences,
            "cells": cells,
            "environment": origin,
        },
    )
    table = Table("method", "front", "chosen", "inner steps", "seconds")
    for method in given.methods:
        own = [c for c in cells if c["method"] == method]
        table.add_row(
            method,
            f"{means[method]['front']:.3f}",
            f"{means[method]['chosen']:.3f}",
            f"{statistics.fmean(c['inner_steps'] for c in own):.0f}",
            f"{statistics.fmean(c['seconds']['all'] for c in own):.0f}",
        )
    Console().print(table)
    for what, by_method in differences.items():
        for other, found in by_method.items():
            print(f"{what}: learned - {other}: {found}")


if __name__ == "__main__":
    main()
