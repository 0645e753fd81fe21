"""Several patches at once: their sum, measured as a run is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from hashlib import sha256
from operator import add
from pathlib import Path

from expunge.errors import DataError
from expunge.folder import LOSSES_NAME, PATCH_NAME, STATE_NAME, check_own, claim, look
from expunge.model.memory import peak_bytes
from expunge.model.patch import Patch
from expunge.progress import timed
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.workbench import Workbench


def compose(
    recipe: Recipe, runs: Sequence[Path], out: Path, *, bench: Workbench, fresh: bool = False
) -> RunRecord:
    """Add up the patches of some runs and measure the sum; nothing is trained.

    Leaves ``recipe.yaml``, ``patch.safetensors`` and ``record.json`` in ``out``.

    Args:
        recipe: what is measured, and on which data; its training settings are not used.
        runs: run directories of one base, each with its patch.
        out: folder of the sum.
        bench: of the recipe's model and data.
        fresh: discard what ``out`` holds of an earlier run.

    Raises:
        PatchError: the patches have different bases.
        DataError: ``out`` holds a run, or a sum of other patches.
    """
    check_own(out)
    patches = [Patch.load(run / PATCH_NAME) for run in runs]
    patch = reduce(add, patches)
    parts = {run.name: sha256((run / PATCH_NAME).read_bytes()).hexdigest() for run in runs}
    if not fresh:
        finished = look(recipe, out)
        if finished is not None and finished.training.get("parts") == parts:
            return finished
        if finished is not None or any((out / name).exists() for name in (STATE_NAME, LOSSES_NAME)):
            raise DataError(
                what="The output folder holds something else than this sum",
                got=f"{out} with a run, or with a sum of other patches",
                allowed="a new folder, or that of the same sum",
                fix="choose another -o, or discard what is there with --fresh",
            )
    claim(recipe, out, fresh=True)
    patch.save(out / PATCH_NAME)
    timing: dict[str, float] = {}
    with timed(timing, "evaluate"):
        scores = bench.evaluate(patch, oracle=recipe.oracle, split=recipe.measure_on)
    origins = [one.metadata for one in patches]
    training = {"parts": parts, "split_reads": {recipe.measure_on: 1}}
    collapsed = {
        run.name: origin["training"]["collapsed"]
        for run, origin in zip(runs, origins, strict=True)
        if origin.get("training", {}).get("collapsed") is not None
    }
    record = RunRecord(
        function=" + ".join(str(origin.get("function")) for origin in origins),
        objective=" + ".join(str(origin.get("objective")) for origin in origins),
        seed=recipe.seed,
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        scores=scores,
        training=training | ({"collapsed": collapsed} if collapsed else {}),
    )
    record.save(out)
    return record
