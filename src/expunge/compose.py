"""Patches made of others, measured as a run is: the sum of several, a random one of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from hashlib import sha256
from operator import add
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expunge.errors import DataError
from expunge.folder import LOSSES_NAME, PATCH_NAME, STATE_NAME, check_own, claim, look
from expunge.model.control import CONTROL, randomised
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
    origins = [one.metadata for one in patches]
    return _measured(
        recipe,
        reduce(add, patches),
        out,
        bench=bench,
        fresh=fresh,
        what="sum",
        made_of={"parts": _hashes(runs)},
        collapsed={
            name: origin["training"]["collapsed"]
            for name, origin in zip(_names(runs), origins, strict=True)
            if origin.get("training", {}).get("collapsed") is not None
        },
        function=" + ".join(str(origin.get("function")) for origin in origins),
        objective=" + ".join(str(origin.get("objective")) for origin in origins),
    )


def control(
    recipe: Recipe, run: Path, out: Path, *, bench: Workbench, fresh: bool = False
) -> RunRecord:
    """Measure a random change as large as a run's: `randomised` of its patch by the recipe's seed.

    Leaves ``recipe.yaml``, ``patch.safetensors`` and ``record.json`` in ``out``. The record's
    objective is ``random-control``, its function and seed are the recipe's.

    Args:
        recipe: what is measured, on which data, and the seed of the noise; its training settings
            are not used.
        run: a run directory with its patch.
        out: folder of the control.
        bench: of the recipe's model and data.
        fresh: discard what ``out`` holds of an earlier run.

    Raises:
        PatchError: the run has no patch.
        DataError: ``out`` holds a run, or the control of another patch.
    """
    check_own(out)
    return _measured(
        recipe,
        randomised(Patch.load(run / PATCH_NAME), recipe.seed),
        out,
        bench=bench,
        fresh=fresh,
        what="control",
        made_of={"control_of": _hashes([run])},
        function=recipe.function,
        objective=CONTROL,
    )


def _measured(
    recipe: Recipe,
    patch: Patch,
    out: Path,
    *,
    bench: Workbench,
    fresh: bool,
    what: str,
    made_of: Mapping[str, Any],
    function: str,
    objective: str,
    collapsed: Mapping[str, int] = MappingProxyType({}),
) -> RunRecord:
    """Save a patch and its scores as a run's, or return the record that tells of the very same.

    Args:
        what: the patch is, in a word.
        made_of: from which files; goes into the record, and is how a finished one is known.
        collapsed: part -> the step at which its run lost what is to be kept.
    """
    if not fresh:
        finished = look(recipe, out)
        if finished is not None and made_of.items() <= finished.training.items():
            return finished
        if finished is not None or any((out / name).exists() for name in (STATE_NAME, LOSSES_NAME)):
            raise DataError(
                what=f"The output folder holds something else than this {what}",
                got=f"{out} with a run, or with what was made of other patches",
                allowed=f"a new folder, or that of the same {what}",
                fix="choose another -o, or discard what is there with --fresh",
            )
    claim(recipe, out, fresh=True)
    patch.save(out / PATCH_NAME)
    timing: dict[str, float] = {}
    with timed(timing, "evaluate"):
        found = bench.measure(patch, oracle=recipe.oracle, split=recipe.measure_on)
    record = RunRecord(
        function=function,
        objective=objective,
        seed=recipe.seed,
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        training={**made_of, "split_reads": {recipe.measure_on: 1}}
        | ({"collapsed": dict(collapsed)} if collapsed else {}),
        **vars(found),
    )
    record.save(out)
    return record


def _hashes(runs: Sequence[Path]) -> dict[str, str]:
    """Name of a run's folder -> hash of its patch file."""
    return {
        name: sha256((run / PATCH_NAME).read_bytes()).hexdigest()
        for name, run in zip(_names(runs), runs, strict=True)
    }


def _names(runs: Sequence[Path]) -> list[str]:
    """Names of the folders; with those above them where two are called alike."""
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else ["/".join(run.parts[-3:]) for run in runs]
