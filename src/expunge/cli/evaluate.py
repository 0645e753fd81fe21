"""`expunge eval`: the scores of a model, patched or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge import console
from expunge.cli.options import Json


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
