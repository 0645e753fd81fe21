"""One after the other: each recipe is trained on the base with the earlier ones' patch applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from expunge.folder import (
    BEFORE_FOLDER,
    LOSSES_NAME,
    PATCH_NAME,
    STATE_NAME,
    holds,
    unclaiming,
)
from expunge.interference import folder
from expunge.learning import objective_of
from expunge.model.patch import Patch
from expunge.progress import Progress, Silent
from expunge.published import as_published, published
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.run import looks_of, run
from expunge.training.loop import Stage
from expunge.workbench import Workbench


def sequence(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    before: Path | None = None,
    progress: Progress | None = None,
    bench: Workbench | None = None,
    fresh: bool = False,
) -> RunRecord:
    """Train recipes of one base one after the other, or go on where that was interrupted.

    What the last recipe depends on is taken from the patched base: boundaries, probes, references,
    an automatic layer or rate. The patch that is left is the sum, and belongs to the original base.

    Leaves ``recipes.yaml``, ``losses.jsonl`` of the last recipe, ``patch.safetensors`` and
    ``record.json`` in ``out``. The record has no scores: `expunge.compose.compose` measures the
    patch as one function or another is measured.

    Args:
        recipes: two or more, in the order of training.
        out: its folder.
        before: folder of the recipes before the last: a run's, or with more than one a sequence's.
            One that is finished is used as it is; default: ``out/before``.
        progress: told what is going on; default: silent.
        bench: of the first recipe, shared with other runs.
        fresh: discard what ``out`` holds.

    Raises:
        RecipeError: fewer than two recipes, different bases, an edit, a learned trade-off that is
            not the first's.
        DataError: ``out`` or ``before`` holds something else.
        ExpungeError: other kinds, from the parts.
    """
    progress = progress or Silent()
    folder.check_recipes("sequence", recipes)
    finished = folder.found("sequence", recipes, out, progress=progress, fresh=fresh)
    if finished is not None:
        return finished
    folder.claim("sequence", recipes, out, fresh=fresh)
    if not holds(out, PATCH_NAME):
        with unclaiming(out):
            where = before or out / BEFORE_FOLDER
            _earlier(recipes[:-1], where, progress, bench, fresh=fresh and before is None)
            patch = _trained(recipes, where, out, progress)
        patch.save(out / PATCH_NAME)
    return folder.finish(recipes, out)


def _earlier(
    recipes: Sequence[Recipe],
    out: Path,
    progress: Progress,
    bench: Workbench | None,
    *,
    fresh: bool,
) -> None:
    """Have the patch of all recipes but the last in ``out``."""
    if len(recipes) > 1:
        sequence(recipes, out, progress=progress, bench=bench, fresh=fresh)
        return
    run(recipes[0].updated(evaluate=False), out, progress=progress, bench=bench, fresh=fresh)
    if bench is not None:
        bench.drop_boundaries()  # what follows has a bench of its own


def _trained(recipes: Sequence[Recipe], before: Path, out: Path, progress: Progress) -> Patch:
    """The last recipe on the base that was changed before; its patch and the earlier one's."""
    first, last = Patch.load(before / PATCH_NAME), recipes[-1].updated(evaluate=False)
    bench = Workbench(last, progress, spill_directory=out, start=first)
    bench.check(last)
    stage = Stage(out / STATE_NAME, out / LOSSES_NAME, bench.context(last, out))
    second, _ = bench.train(last, stage, out)
    bench.release_training()
    assert isinstance(second, Patch)
    earlier, facts = first.metadata["training"], second.metadata["training"]
    more = {k: v for k, v in bench.data.hashes.items() if earlier["data"].get(published(k)) != v}
    training = {
        **{name: fact for name, fact in facts.items() if name != "calibration"},
        "timing": folder.add_up([earlier["timing"], facts["timing"]]),
        "data": as_published({**earlier["data"], **more}),
        "looks": looks_of(facts) + looks_of(earlier),
        "before": {
            "patch": sha256((before / PATCH_NAME).read_bytes()).hexdigest(),
            "objective": first.metadata["objective"],
            "collapsed": earlier["collapsed"],
        },
    }
    method = " then ".join(objective_of(one).name for one in recipes)
    return replace(first + second, metadata=folder.metadata(recipes, method, training))
