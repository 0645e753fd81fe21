"""Commands that only look: `plan` before a run, `ls` and `show` after it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge import console
from expunge.cli.options import Json


def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Model directory, name on the Hub, or a preset: llama-3.1-8b, qwen2.5-7b, "
            "olmo-3-7b, mistral-7b.",
        ),
    ],
    layer: Annotated[
        str, typer.Option(metavar="N", help="Deepest layer read, counted from 0.")
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Optimiser steps; default: the preset's, or 150."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Forget texts, and retain texts, of one step; default: the preset's, or 16.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a text; default: the preset's, or 512."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16; default: the preset's, or float32.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, cpu, cuda, …: measured here; h100, a100, rtx4090: estimated.",
        ),
    ] = "auto",
    episodes: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Episodes of a learned trade-off; 0 leaves it out; default: a recipe's.",
        ),
    ] = None,
    episode_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Steps of each after the first episode; default: about an eighth.",
        ),
    ] = None,
    look_items: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Questions of each side of a look after an action; default: a recipe's.",
        ),
    ] = None,
    reward: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="What looks measure: likelihood, accuracy or representation."
        ),
    ] = "likelihood",
    as_json: Json = False,
) -> None:
    """Tell what a run would read, compute and take, without loading the weights.

    Beside it the same for a learned trade-off: all its episodes, and the run.
    """
    from expunge.plan import plan as make_plan
    from expunge.tables import print_plan

    made = make_plan(
        model,
        layer=console.number(layer),
        steps=steps,
        batch_size=batch_size,
        tokens=tokens,
        dtype=dtype,
        device=device,
        episodes=episodes,
        episode_steps=episode_steps,
        look_items=look_items,
        reward=reward,
    )
    if as_json:
        console.print_json(made.to_dict())
    else:
        print_plan(console.stdout, made)


def list_(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder that holds runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs under a folder; without one, the objectives, edits and functions there are."""
    from expunge import tables
    from expunge.edits import EDITS
    from expunge.functions import FUNCTIONS
    from expunge.objectives import OBJECTIVES
    from expunge.records import find_records
    from expunge.registry import Entry

    if directory is not None:
        progress = console.progress()
        records = find_records(directory, lambda error: progress.say(f"left out: {error}"))
        if as_json:
            console.print_json({"runs": [{"run": str(p), **r.to_dict()} for p, r in records]})
        else:
            tables.print_runs(console.stdout, records)
        return
    parts: dict[str, list[Entry[Any]]] = {
        "objectives": list(OBJECTIVES),
        "edits": list(EDITS),
        "functions": list(FUNCTIONS),
    }
    if as_json:
        console.print_json(
            {
                kind: [{"name": e.name, "source": e.source, "deviations": e.deviations} for e in es]
                for kind, es in parts.items()
            }
        )
    else:
        tables.print_parts(console.stdout, parts)


def show(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run directory, a patch, or probes.")
    ],
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw a learned run's episodes, front and knobs, or probes: .svg or .png.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a run's scores, front and times, what a patch changes, or what probes found."""
    from expunge import tables
    from expunge.edits import load_intervention
    from expunge.folder import PROBES_NAME, kind_of
    from expunge.metalearning.archive import FRONT_NAME
    from expunge.metalearning.figure import tradeoff_figure
    from expunge.model.patch import Patch
    from expunge.probes.figure import probe_figure
    from expunge.probes.probe import load_probes
    from expunge.records import RunRecord

    learned_run = (path / FRONT_NAME).exists()
    if figure is not None and path.is_dir() and not learned_run:
        path /= PROBES_NAME
    facts: dict[str, Any]
    kind = kind_of(path)
    if kind == "probes" or (figure is not None and not learned_run):
        probes, _ = load_probes(path)
        if figure is not None:
            probe_figure(probes, figure)
        facts = {"probes": [probe.to_dict() for probe in probes]}
        show_it = partial(tables.print_probes, console.stdout, probes)
    elif kind == "intervention":
        made = load_intervention(path)
        facts = {"edit": made.name, **made.metadata}
        show_it = partial(console.result, False, {key: str(fact) for key, fact in facts.items()})
    elif path.suffix == ".safetensors":
        learned = Patch.load(path)
        facts = {"norm": learned.norm(), "tensors": list(learned.names), **learned.metadata}
        show_it = partial(tables.print_patch, console.stdout, learned)
    else:
        record = RunRecord.load(path)
        if figure is not None:
            tradeoff_figure(path, figure)
        facts = console.run_facts(path, record)
        show_it = partial(console.show_run, path, record)
    console.print_json(facts) if as_json else show_it()
