"""The command line: parse, call, print, exit code.

Results go to standard output, everything else to standard error; ``--json`` prints one object.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

# Before any library that would look for a hub: only a model named by the user is fetched.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer

from expunge import console
from expunge.errors import DataError, ExpungeError, RecipeError, ResourceError
from expunge.files import disk_errors

INTERRUPTED = 130

app = typer.Typer(
    name="expunge",
    help="Remove a language function from an open-weight causal language model, with evidence.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# What every mistake in the words of a command line is to typer, old or new.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of the recipe; repeat for several. a.b=v reaches into a.",
    ),
]
EPISODES_HELP = "Episodes of a learned trade-off, or whole runs of a search; default: 30."
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what the folder holds of a run.")]


@app.command()
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
    episodes: Annotated[int | None, typer.Option(metavar="N", help=EPISODES_HELP)] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Random seed; default: 0.")] = None,
    oracle: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A model never taught the function, to compare with."),
    ] = None,
    settings: Settings = None,
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
            "tradeoff": tradeoff,
            "episodes": episodes,
            "seed": seed,
            "oracle": oracle,
        }
        if batch_size is not None:
            automatic = batch_size == "auto"
            flags |= (
                {"micro_batch_size": "auto"}
                if automatic
                else {"batch_size": console.number(batch_size)}
            )
        written = {} if recipe is None else read_settings(recipe)
        given = {key: value for key, value in flags.items() if value is not None}
        chosen = Recipe.build(merge_overrides({**written, **given}, settings or []))
        check_episodes(episodes, chosen.tradeoff)
        record = run_recipe(chosen, out, progress=console.progress(), fresh=fresh)
    if as_json:
        console.print_json({"out": str(out), **console.run_facts(out, record)})
    else:
        console.show_run(out, record)
        console.say(f"run directory: {out}")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the runs.")
    ] = Path("demo-run"),
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Seeds of the main runs; the others get 3.")
    ] = 5,
    tradeoff: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of the main runs: fixed, at hand-chosen settings, or learned."
        ),
    ] = "fixed",
    episodes: Annotated[int | None, typer.Option(metavar="N", help=EPISODES_HELP)] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Unlearn a domain of knowledge, rudeness, and both, on the embedded miniature.

    Needs neither network nor data. The same command goes on with a demo that
    was interrupted.
    """
    with console.resumable(), disk_errors(out):
        from expunge.demo import demo as run_demo
        from expunge.tables import print_demo

        summary = run_demo(
            out,
            seeds=seeds,
            tradeoff=tradeoff,
            episodes=episodes,
            progress=console.progress(),
            fresh=fresh,
        )
    if as_json:
        console.print_json(summary.to_dict())
    else:
        print_demo(console.stdout, summary)


@app.command()
def compare(
    plan: Annotated[
        Path | None,
        typer.Argument(
            metavar="PLAN", help="What to compare, in YAML; default: all, on the miniature."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the runs.")
    ] = Path("comparison"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Four methods, three seeds, on the miniature.")
    ] = False,
    settings: Settings = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes; default: one a core, on a GPU one."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray cluster; needs the extra ray.")
    ] = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Try every objective on every function, with seeds, tests and a verdict.

    The settings of each are chosen by a search of equal size on validation; the
    test split is read once a run. The same command goes on where it stopped.
    """
    with console.resumable(), disk_errors(out):
        from expunge.compare import Comparing, ComparisonPlan, miniature_plan
        from expunge.recipe import merge_overrides, read_settings
        from expunge.tables import print_comparison

        if plan is not None and quick:
            raise RecipeError(
                what="--quick is of the built-in comparison",
                got=f"--quick with {plan}",
                allowed="a plan, or --quick",
                fix="leave --quick out; --set methods=… and --set seeds=N make a plan smaller",
            )
        if plan is None:
            made = miniature_plan(out / "data", quick=quick, overrides=settings or [])
        else:
            made = ComparisonPlan.build(merge_overrides(read_settings(plan), settings or []))
        comparing = Comparing(
            made, out, workers=workers, progress=console.progress(), fresh=fresh, ray=ray
        )
        found = comparing.run()
    if as_json:
        console.print_json(found.to_dict())
    else:
        print_comparison(console.stdout, found)


Recipes = Annotated[
    list[Path],
    typer.Argument(metavar="RECIPE RECIPE…", help="Recipes in YAML, of one model."),
]
OutDir = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the result.")]


@app.command()
def joint(recipes: Recipes, out: OutDir, fresh: Fresh = False, as_json: Json = False) -> None:
    """Train several recipes at once on one model, and measure the patch by each.

    At each step the gradients of all losses add up. Steps, learning rate and
    the rest of the optimiser are the first recipe's.
    """
    from expunge.interference import joint as train

    _combine(train, recipes, out, fresh, as_json)


@app.command()
def sequence(recipes: Recipes, out: OutDir, fresh: Fresh = False, as_json: Json = False) -> None:
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


@app.command()
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


@app.command()
def apply(
    patch: Annotated[
        Path, typer.Argument(metavar="PATCH", help="A patch file, or a run directory.")
    ],
    model: Annotated[str, typer.Option(metavar="DIR", help="The base model's directory.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The new model's directory.")
    ],
    scale: Annotated[
        float, typer.Option(metavar="S", help="How much of the patch: 0.5 for half, -1 to undo.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Write the patched model; nothing differs from the base but the changed tensors."""
    from expunge.model.apply import apply_patch
    from expunge.model.patch import Patch

    learned = Patch.load(console.patch_path(patch))
    with console.progress().phase("apply", 1) as advance, disk_errors(out):
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            advance(done - told, "bytes", total=total)
            told = done

        apply_patch(learned, model, out, scale=scale, on_progress=tell)
    console.result(as_json, {"out": str(out), "tensors": list(learned.names), "scale": scale})


@app.command()
def export(
    patch: Annotated[
        Path, typer.Argument(metavar="PATCH", help="A patch file, or a run directory.")
    ],
    model: Annotated[str, typer.Option(metavar="DIR", help="The base model's directory.")],
    rank: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rank of the adapter; more loses less.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The adapter's directory.")
    ],
    as_json: Json = False,
) -> None:
    """Write the patch as a PEFT LoRA adapter, and tell what the low rank loses.

    The relative error of a tensor is the norm of what is lost over that of the
    change: 0 is exact, 1 is nothing kept. With a run's record beside the patch,
    a model card is written too.
    """
    from expunge.card import card, record_beside, save_card
    from expunge.model.apply import check_out, verified_targets
    from expunge.model.checkpoint import Checkpoint
    from expunge.model.lora import CONV1D_TYPES, to_peft
    from expunge.model.patch import Patch
    from expunge.tables import print_export

    learned, base = Patch.load(console.patch_path(patch)), Checkpoint.open(model)
    check_out(base.directory, out, what="The adapter")
    verified_targets(base, learned)
    is_conv1d = base.config.get("model_type") in CONV1D_TYPES
    with disk_errors(out):
        made = to_peft(learned, out, rank=rank, base_model=model, fan_in_fan_out=is_conv1d)
    try:
        save_card(card(record_beside(patch), adapter_error=made.total_error), out)
    except DataError as error:
        console.say(f"note: no model card is written: {error.what}")
    if as_json:
        console.print_json(
            {"out": str(out), "errors": made.errors, "total_error": made.total_error}
        )
    else:
        print_export(console.stdout, made)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model directory, or name on the Hub.")],
    patch: Annotated[
        Path | None,
        typer.Option(metavar="PATCH", help="Patch file or run directory, applied in memory."),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Multiple-choice questions.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Texts.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts to be continued, for toxicity.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What judges continuations, at least two: tfidf:FILE, words:FILE, hf:DIR, "
            "detoxify, perspective.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Longest text in tokens; the rest is cut off.")
    ] = 512,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …; auto: cuda if there is one.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16, in memory.")
    ] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code shipped with the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model, patched or not.

    Accuracy and nats/token on questions, nats/token and perplexity on text,
    toxicity of continuations of prompts, each with a 95 % interval.
    """
    from expunge.measure import measure
    from expunge.tables import print_scores

    scores = measure(
        model,
        patch=None if patch is None else console.artefact_path(patch),
        questions=questions,
        text=text,
        prompts=prompts,
        scorers=scorer or (),
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=console.progress(),
    )
    if as_json:
        from dataclasses import asdict

        console.print_json({"model": model, "scores": [asdict(score) for score in scores]})
    else:
        print_scores(console.stdout, scores)


@app.command()
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
        typer.Option(min=1, metavar="N", help="Steps of an episode; default: a fifth of steps."),
    ] = None,
    look_items: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Validation items read before each action."),
    ] = None,
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
    )
    if as_json:
        console.print_json(made.to_dict())
    else:
        print_plan(console.stdout, made)


@app.command("ls")
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


@app.command()
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


@app.command("card")
def card_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="PATH", help="File or folder; without it, print."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a README that expunge did not write.")
    ] = False,
) -> None:
    """Write a model card in the Hub's format: what was removed, evidence, limits, provenance."""
    from expunge.card import card, save_card
    from expunge.records import RunRecord

    made = card(RunRecord.load(run))
    if out is None:
        sys.stdout.write(made)
    else:
        console.say(f"model card: {save_card(made, out, replace=replace)}")


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs, or folders below which runs lie."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write each figure as an SVG file in this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one page that compares runs, or shows one: verdict, scores, tests, texts, provenance.

    It needs the runs' records alone, no model. The page loads nothing and runs
    nothing, so it can be sent around or printed.
    """
    from expunge.comparison import Comparison
    from expunge.report.gather import gather
    from expunge.report.page import page_of
    from expunge.report.render import check_own, save_page

    check_own(out)
    gathered = gather(paths)
    for what, why in gathered.left_out:
        console.say(f"left out: {what}: {why}")
    page = page_of(gathered, Comparison.of(gathered.records))
    written = save_page(page, out, figures)
    facts = {"out": str(out), "runs": len(gathered.sources), "left_out": len(gathered.left_out)}
    console.result(as_json, {**facts, "figures": [str(path) for path in written[1:]]})


def main() -> NoReturn:
    """Entry point: errors of the user without a traceback, each kind with its exit code."""
    # A scheduler's polite stop is an interruption like Ctrl-C: state is saved, nothing is lost.
    signal.signal(signal.SIGTERM, console.interrupt)
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except ExpungeError as error:
        console.fail(error)
    except UsageError as error:
        console.fail(console.as_recipe_error(error))
    # typer may turn the first into the second, or into the exit code 130.
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        console.fail(
            ResourceError(
                what="A file or folder cannot be used",
                got=f"{error.strerror}: {error.filename}",
                allowed="paths that the system accepts, and that you may read and write",
                fix="check the path and its permissions",
            )
        )
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
