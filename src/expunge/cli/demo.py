"""`expunge demo`: the whole story on the embedded miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge import console
from expunge.cli.options import Episodes, Fresh, Json, RunsFolder
from expunge.files import disk_errors


def demo(
    out: RunsFolder = Path("demo-run"),
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Seeds of the main runs; the others get 3.")
    ] = 5,
    tradeoff: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of the main runs: fixed, at hand-chosen settings, or learned."
        ),
    ] = "fixed",
    episodes: Episodes = None,
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
