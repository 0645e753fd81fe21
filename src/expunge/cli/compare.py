"""`expunge compare`: every objective on every function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge import console
from expunge.cli.options import Fresh, Json, RunsFolder, Settings
from expunge.errors import RecipeError
from expunge.files import disk_errors


def compare(
    plan: Annotated[
        Path | None,
        typer.Argument(
            metavar="PLAN", help="What to compare, in YAML; default: all, on the miniature."
        ),
    ] = None,
    out: RunsFolder = Path("comparison"),
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
