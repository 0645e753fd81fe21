"""What others read of runs: `card`, a model card of one; `report`, a page of several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from expunge import console
from expunge.cli.options import Json


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
