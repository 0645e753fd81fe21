"""Another point of an exploring run's front becomes the run's patch, and is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge.errors import PatchError, RecipeError
from expunge.folder import (
    LOSSES_NAME,
    PATCH_NAME,
    RECIPE_NAME,
    check_same_data,
    check_trained_here,
    clear_leftovers,
)
from expunge.metalearning.archive import (
    FRONT_FOLDER,
    Entry,
    chosen,
    chosen_facts,
    collapse_of,
    load_front,
    save_front,
)
from expunge.model.patch import Patch
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.run import measured
from expunge.training.log import ends_of, read_losses, write_losses
from expunge.workbench import Workbench


@dataclass(frozen=True)
class Picked:
    """What a pick left.

    Attributes:
        point: number on the front, from 1, by forgetting.
        changed: whether it was another one before.
    """

    point: int
    front: tuple[Entry, ...]
    record: RunRecord
    changed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "point": self.point,
            "changed": self.changed,
            "front": [entry.to_dict() for entry in self.front],
            **self.record.to_dict(),
        }


def pick(out: Path, point: int, *, progress: Progress | None = None) -> Picked:
    """Make a point of the front the run's patch; measure it on the split that the run measured on.

    ``front.json`` is written first and ``record.json`` last, each whole: where a kill leaves them
    at odds, the same command does it again. Every reading of a split counts in the record.

    Args:
        out: folder of a finished run with a learned trade-off.
        point: number on the front, from 1, by forgetting.
        progress: told what is going on; default: silent.

    Raises:
        PatchError: no front there, or a patch that does not belong to it.
        RecipeError: no such point.
        DataError: the run is not finished, or its data has changed.
    """
    progress = progress or Silent()
    before, record = load_front(out), RunRecord.load(out)
    if not 1 <= point <= len(before):
        raise RecipeError(
            what="The front has no point of that number",
            got=str(point),
            allowed=f"1 to {len(before)}",
            fix=f"`expunge show {out}` lists the points",
        )
    front = chosen(before, point - 1)
    facts = chosen_facts(front)
    present = Patch.load(out / PATCH_NAME)
    check_trained_here(present, out)
    known = _tradeoff(present.metadata["training"], out)
    if before == front and facts == known["chosen"] == _tradeoff(record.training, out)["chosen"]:
        return Picked(point, tuple(front), record, changed=False)
    recipe = Recipe.load(out / RECIPE_NAME)
    bench = Workbench(recipe, progress, spill_directory=out)
    bench.check(recipe)
    check_same_data(present, bench.data.hashes, out)
    taken = Patch.load(out / FRONT_FOLDER / front[point - 1].file)
    training = present.metadata["training"] | {"tradeoff": {**known, "chosen": facts}}
    searched = known.get("kind") == "search"  # its trials are whole runs
    log = read_losses(
        out / FRONT_FOLDER / front[point - 1].losses_file if searched else out / LOSSES_NAME
    )
    training |= ends_of(log) if searched else {}
    training |= collapse_of(front[point - 1], known["tried"])
    metadata = {**present.metadata, "training": training}
    patch = replace(present, deltas=taken.deltas, base=taken.base, metadata=metadata)
    record = measured(recipe, patch, bench, record.training.get("split_reads", {}), log)
    clear_leftovers(out)
    save_front(out, front)
    if searched:
        write_losses(out / LOSSES_NAME, log)
    patch.save(out / PATCH_NAME)
    record.save(out)
    return Picked(point, tuple(front), record, changed=True)


def _tradeoff(training: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What is told of the learned trade-off. Raises PatchError if there was none."""
    found = training.get("tradeoff")
    if not isinstance(found, dict) or "chosen" not in found:
        raise PatchError(
            what=f"The patch or the record in {out} is not of the run that left the front there",
            got="nothing about a learned trade-off",
            allowed="the files as that run, or a pick, left them",
            fix="put them back, or start again with --fresh",
        )
    return found
