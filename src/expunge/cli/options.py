"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what the folder holds of a run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of the recipe; repeat for several. a.b=v reaches into a.",
    ),
]
Episodes = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Episodes of a learned trade-off, or whole runs of a search; default: 30."
    ),
]
Recipes = Annotated[
    list[Path],
    typer.Argument(metavar="RECIPE RECIPE…", help="Recipes in YAML, of one model."),
]
RunsFolder = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the runs.")]
ResultFolder = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the result.")
]
PatchPath = Annotated[
    Path, typer.Argument(metavar="PATCH", help="A patch file, or a run directory.")
]
BaseModel = Annotated[str, typer.Option(metavar="DIR", help="The base model's directory.")]
