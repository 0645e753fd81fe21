"""The command line: parse, call, print, exit code.

Results go to standard output, everything else to standard error; ``--json`` prints one object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

# Before any library that would look for a hub: only a model named by the user is fetched.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.console import Console

from expunge.errors import ExpungeError

INTERRUPTED = 130

app = typer.Typer(
    name="expunge",
    help="Remove a language function from an open-weight causal language model, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stderr = Console(stderr=True)
stdout = Console()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting of the recipe, as key=value.")
]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("run"),
    model: Annotated[str | None, typer.Option(help="Model directory or hub name.")] = None,
    function: Annotated[str | None, typer.Option(help="Language function to remove.")] = None,
    objective: Annotated[str | None, typer.Option(help="Objective; see `expunge ls`.")] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="Texts to forget; repeat for several topics.")
    ] = None,
    retain: Annotated[
        list[str] | None, typer.Option(help="Texts to keep; repeat for several sources.")
    ] = None,
    questions: Annotated[str | None, typer.Option(help="Questions on the forgotten.")] = None,
    retain_questions: Annotated[str | None, typer.Option(help="Questions on the kept.")] = None,
    text: Annotated[str | None, typer.Option(help="Text for perplexity.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Deepest layer read (0-based), or auto.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, or auto.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Texts of one step; auto: 16, computed as many at once as fit."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    oracle: Annotated[str | None, typer.Option(help="Retrained model to compare with.")] = None,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option(help="Discard an earlier run in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Learn a patch from a recipe or from flags, and measure it. Resumes an interrupted run."""
    from expunge.recipe import Recipe, merge_overrides
    from expunge.run import run as run_recipe

    flags: dict[str, Any] = {
        "model": model,
        "function": function,
        "objective": objective,
        "forget": forget or None,
        "retain": retain or None,
        "questions": questions,
        "retain_questions": retain_questions,
        "text": text,
        "layer": _number(layer),
        "steps": steps,
        "lr": _number(lr),
        "seed": seed,
        "oracle": oracle,
    }
    if batch_size is not None:
        automatic = batch_size == "auto"
        flags |= {"micro_batch_size": "auto"} if automatic else {"batch_size": _number(batch_size)}
    given = merge_overrides({k: v for k, v in flags.items() if v is not None}, settings or [])
    chosen = Recipe.load(recipe, given) if recipe is not None else Recipe.build(given)
    record = run_recipe(chosen, out, progress=_progress(), fresh=fresh)
    if as_json:
        _print_json({"out": str(out), **record.to_dict()})
    else:
        from expunge.tables import print_record

        print_record(stdout, record)
        stderr.print(f"run directory: {out}", markup=False, highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the runs.")] = Path(
        "demo-run"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    fresh: Annotated[bool, typer.Option(help="Discard earlier runs in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Unlearn the hazard domain of the embedded miniature with three objectives."""
    from expunge.demo import demo as run_demo
    from expunge.tables import print_demo

    summary = run_demo(out, seeds=seeds, progress=_progress(), fresh=fresh)
    if as_json:
        _print_json(summary.to_dict())
    else:
        print_demo(stdout, summary)


@app.command()
def apply(
    patch: Annotated[Path, typer.Argument(help="A patch file, or a run directory.")],
    model: Annotated[str, typer.Option(help="The base model's directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New model directory.")],
    scale: Annotated[float, typer.Option(help="Multiply the patch.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Write the patched model; only the changed tensors differ from the base's bytes."""
    from expunge.model.checkpoint import apply_patch
    from expunge.model.patch import Patch

    learned = Patch.load(_patch_path(patch))
    with _progress().phase("apply", 1) as advance:
        apply_patch(learned, model, out, scale=scale)
        advance(1)
    _result(as_json, {"out": str(out), "tensors": list(learned.names), "scale": scale})


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Model directory or hub name.")],
    patch: Annotated[Path | None, typer.Option(help="A patch to apply in memory.")] = None,
    questions: Annotated[str | None, typer.Option(help="Questions file.")] = None,
    text: Annotated[str | None, typer.Option(help="Text file.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest text in tokens.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy and nats/token on questions, nats/token and perplexity on text."""
    from expunge.measure import measure
    from expunge.tables import print_scores

    scores = measure(
        model,
        patch=None if patch is None else _patch_path(patch),
        questions=questions,
        text=text,
        max_tokens=max_tokens,
        device=device,
        progress=_progress(),
    )
    if as_json:
        from dataclasses import asdict

        _print_json({"model": model, "scores": [asdict(score) for score in scores]})
    else:
        print_scores(stdout, scores)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Model directory.")],
    layer: Annotated[str, typer.Option(help="Deepest layer read, or auto.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of one step.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """What a run will read, compute and take, before anything is loaded."""
    from expunge.plan import plan as make_plan
    from expunge.tables import print_plan

    made = make_plan(
        model, layer=_number(layer), steps=steps, batch_size=batch_size, tokens=tokens, dtype=dtype
    )
    if as_json:
        _print_json(made.to_dict())
    else:
        print_plan(stdout, made)


@app.command("ls")
def list_(
    directory: Annotated[Path | None, typer.Argument(help="Folder that holds runs.")] = None,
    as_json: Json = False,
) -> None:
    """Runs under a folder; without one, the objectives and functions there are."""
    from expunge import tables
    from expunge.functions import FUNCTIONS
    from expunge.objectives import OBJECTIVES
    from expunge.records import find_records
    from expunge.registry import Entry

    if directory is not None:
        records = find_records(directory)
        if as_json:
            _print_json({"runs": [{"run": str(p), **r.to_dict()} for p, r in records]})
        else:
            tables.print_runs(stdout, records)
        return
    parts: dict[str, list[Entry[Any]]] = {
        "objectives": list(OBJECTIVES),
        "functions": list(FUNCTIONS),
    }
    if as_json:
        _print_json(
            {
                kind: [{"name": e.name, "source": e.source, "deviations": e.deviations} for e in es]
                for kind, es in parts.items()
            }
        )
    else:
        tables.print_parts(stdout, parts)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A run directory or a patch file.")],
    as_json: Json = False,
) -> None:
    """A run's scores and settings, or what a patch changes."""
    from expunge import tables
    from expunge.model.patch import Patch
    from expunge.records import RunRecord

    if path.suffix == ".safetensors":
        learned = Patch.load(path)
        if as_json:
            _print_json(
                {"norm": learned.norm(), "tensors": list(learned.names), **learned.metadata}
            )
        else:
            tables.print_patch(stdout, learned)
        return
    record = RunRecord.load(path)
    if as_json:
        _print_json(record.to_dict())
    else:
        tables.print_record(stdout, record)


def main() -> NoReturn:
    """Entry point: errors of the user without a traceback, each kind with its exit code."""
    # A scheduler's polite stop is an interruption like Ctrl-C: state is saved, nothing is lost.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except ExpungeError as error:
        stderr.print("[bold red]error:[/] ", end="")
        stderr.print(str(error), markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr.print("interrupted; the same command goes on where it stopped")
        sys.exit(INTERRUPTED)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _progress() -> Any:
    from expunge.progress import Bars

    return Bars(stderr)


def _number(text: str | None) -> int | float | str | None:
    """A flag that is a number or a word; the recipe's validation judges it."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _patch_path(path: Path) -> Path:
    from expunge.run import PATCH_NAME

    return path / PATCH_NAME if path.is_dir() else path


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _result(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        _print_json(value)
    else:
        for key, item in value.items():
            stdout.print(f"{key}: {item}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
