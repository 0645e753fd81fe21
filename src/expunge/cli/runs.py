"""Runs: `run`, trained from a recipe or flags; `joint` and `sequence`, of several; `pick`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge import console
from expunge.cli.options import Episodes, Fresh, Json, Recipes, ResultFolder, Settings


def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A recipe in YAML; flags win over it."),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the run.")
    ] = Path("run"),
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model directory, or name on the Hub.")
    ] = None,
    function: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Language function to remove; see `expunge ls`."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Objective or edit; default: the function's own."),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Texts to forget; repeat for several topics."),
    ] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Texts to keep; repeat for several sources."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Toxic texts with their neutral wordings."),
    ] = None,
    labelled: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts labelled toxic or neutral, where none is paired."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to be continued, beside held-back openings."),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What judges continuations, at least two: tfidf[:FILE], words[:FILE], hf:DIR, "
            "detoxify, perspective; default: tfidf and words, from the run's own training texts.",
        ),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Questions on what is forgotten.")
    ] = None,
    retain_questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Questions on what must stay.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text for perplexity; default: held-back retain texts."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(metavar="N", help="Deepest layer read, counted from 0; default: auto."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimiser steps; default: 150.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(metavar="X", help="Learning rate; default: auto.")
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Forget texts, and retain texts, of one step; default: 16. However many, they "
            "are computed as many at once as fit into memory; auto says just that.",
        ),
    ] = None,
    tradeoff: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How forgetting and keeping are weighed: fixed, schedule, learned or search; "
            "default: fixed.",
        ),
    ] = None,
    episodes: Episodes = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Random seed; default: 0.")] = None,
    oracle: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A model never taught the function, to compare with."),
    ] = None,
    settings: Settings = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes that play episodes; default: 1, but 2 to learn and up to 4 to search "
            "for a small model without a GPU.",
        ),
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Learn a patch and measure it.

    Settings come from a recipe, from flags, or both; model, retain and what is
    to be forgotten have no default: --forget for knowledge, --pairs or --labelled
    for toxicity. The same command goes on with a run that was interrupted.
    """
    with console.resumable():
        from expunge.recipe import Recipe, check_episodes, merge_overrides, read_settings
        from expunge.run import run as run_recipe

        size = "micro_batch_size" if batch_size == "auto" else "batch_size"
        flags: dict[str, Any] = {
            "model": model,
            "function": function,
            "objective": objective,
            "forget": forget or None,
            "retain": retain or None,
            "pairs": pairs,
            "labelled": labelled,
            "prompts": prompts,
            "scorers": scorer or None,
            "questions": questions,
            "retain_questions": retain_questions,
            "text": text,
            "layer": console.number(layer),
            "steps": steps,
            "lr": console.number(lr),
            size: console.number(batch_size),
            "tradeoff": tradeoff,
            "episodes": episodes,
            "seed": seed,
            "oracle": oracle,
        }
        written = {} if recipe is None else read_settings(recipe)
        given = {key: value for key, value in flags.items() if value is not None}
        chosen = Recipe.build(merge_overrides({**written, **given}, settings or []))
        check_episodes(episodes, chosen.tradeoff, workers)
        record = run_recipe(chosen, out, progress=console.progress(), fresh=fresh, workers=workers)
    if as_json:
        console.print_json({"out": str(out), **console.run_facts(out, record)})
    else:
        console.show_run(out, record)
        console.say(f"run directory: {out}")


def joint(recipes: Recipes, out: ResultFolder, fresh: Fresh = False, as_json: Json = False) -> None:
    """Train several recipes at once on one model, and measure the patch by each.

    At each step the gradients of all losses add up. Steps, learning rate and
    the rest of the optimiser are the first recipe's.
    """
    from expunge.interference import joint as train

    _combine(train, recipes, out, fresh, as_json)


def sequence(
    recipes: Recipes, out: ResultFolder, fresh: Fresh = False, as_json: Json = False
) -> None:
    """Train recipes one after the other on one model, and measure the patch by each.

    Each is trained on the model as the ones before left it.
    """
    from expunge.interference import sequence as train

    _combine(train, recipes, out, fresh, as_json)


def _combine(train: Any, paths: list[Path], out: Path, fresh: bool, as_json: bool) -> None:
    from expunge.interference import measured_by_each
    from expunge.recipe import Recipe

    with console.resumable():
        recipes, progress = [Recipe.load(path) for path in paths], console.progress()
        record = train(recipes, out, progress=progress, fresh=fresh)
        measured = measured_by_each(recipes, out, progress=progress, fresh=fresh)
    if as_json:
        scores = {where.name: one.to_dict() for where, one in measured.items()}
        console.print_json({"out": str(out), **record.to_dict(), "measured": scores})
        return
    for where, one in {out: record, **measured}.items():
        console.show_run(where, one)
    console.say(f"run directory: {out}")


def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that left a front.")],
    point: Annotated[
        int, typer.Option(metavar="N", help="Number on the front; `expunge show RUN` lists them.")
    ],
    as_json: Json = False,
) -> None:
    """Take another point of a run's front, and measure it.

    The point's patch becomes the run's; the record tells of it, and counts
    every reading of the test split.
    """
    with console.resumable():
        from expunge.picking import pick as pick_point

        picked = pick_point(run, point, progress=console.progress())
    if not picked.changed:
        console.say(f"point {point} is the one chosen already")
    if as_json:
        console.print_json({"out": str(run), **picked.to_dict()})
    else:
        console.show_run(run, picked.record)
