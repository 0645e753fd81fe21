"""A patch becomes a model: `apply` writes it patched, `export` an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge import console
from expunge.cli.options import BaseModel, Json, PatchPath
from expunge.errors import DataError
from expunge.files import disk_errors


def apply(
    patch: PatchPath,
    model: BaseModel,
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


def export(
    patch: PatchPath,
    model: BaseModel,
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
