"""Several patches at once: their sum, measured as a run is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from expunge.folder import PATCH_NAME, check_own, claim, look
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
        DataError: ``out`` holds another run.
    """
    check_own(out)
    finished = None if fresh else look(recipe, out)
    if finished is not None:
        return finished
    patches = [Patch.load(run / PATCH_NAME) for run in runs]
    patch = reduce(add, patches)
    claim(recipe, out, fresh=True)
    patch.save(out / PATCH_NAME)
    timing: dict[str, float] = {}
    with timed(timing, "evaluate"):
        scores = bench.evaluate(patch, oracle=recipe.oracle, split=recipe.measure_on)
    parts = [one.metadata for one in patches]
    record = RunRecord(
        function=" + ".join(str(part.get("function")) for part in parts),
        objective=" + ".join(str(part.get("objective")) for part in parts),
        seed=recipe.seed,
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        scores=scores,
        training={"parts": [run.name for run in runs]},
    )
    record.save(out)
    return record
