"""What several recipes left, measured as each of their functions is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expunge.compose import compose
from expunge.folder import MEASURED_PREFIX
from expunge.progress import Progress
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.workbench import Workbench


def measured_by_each(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    progress: Progress,
    fresh: bool = False,
) -> dict[Path, RunRecord]:
    """Measure the patch in ``out`` by each recipe's suite; folder -> record.

    The folders are ``out/measured-knowledge`` and so on; recipes that say ``evaluate: false`` are
    left out.
    """
    found: dict[Path, RunRecord] = {}
    for recipe in recipes:
        if not recipe.evaluate:
            continue
        where = out / f"{MEASURED_PREFIX}{recipe.function}"
        if where in found:
            where = where.with_name(f"{where.name}-{len(found) + 1}")
        found[where] = compose(
            recipe, (out,), where, bench=Workbench(recipe, progress), fresh=fresh
        )
    return found
