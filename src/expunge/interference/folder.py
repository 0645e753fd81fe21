"""What joint training and training in sequence have in common: their recipes and their folder.

A folder holds ``recipes.yaml``, ``losses.jsonl``, ``patch.safetensors`` and ``record.json``, and
while unfinished ``state.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from expunge import provenance
from expunge.errors import DataError, RecipeError
from expunge.files import local_path, write_text
from expunge.folder import (
    PATCH_NAME,
    RECIPE_NAME,
    RECIPES_NAME,
    STATE_NAME,
    WORK_NAMES,
    check_own,
    holds,
    make_way,
)
from expunge.learning import method_of
from expunge.model.memory import peak_bytes
from expunge.model.patch import Patch
from expunge.progress import Progress
from expunge.published import published, published_recipe
from expunge.recipe import Recipe, read_settings
from expunge.records import RECORD_NAME, RunRecord

How = Literal["joint", "joint-sum", "sequence"]
# What must be alike where several objectives share one opened model.
SHARED_FIELDS = ("dtype", "device", "trust_remote_code")


def check_recipes(how: How, recipes: Sequence[Recipe]) -> None:
    """Raise RecipeError for recipes that cannot be trained on one base in this way."""
    if len(recipes) < 2:
        raise RecipeError(
            what="There is nothing to combine",
            got=f"{len(recipes)} recipe",
            allowed="two recipes or more",
            fix="name a second recipe; `expunge run` trains a single one",
        )
    bases = {recipe.model: local_path(recipe.model).resolve() for recipe in recipes}
    if len({*bases.values()}) > 1:
        raise RecipeError(
            what="The recipes have different bases",
            got=", ".join(bases),
            allowed="one model for all",
            fix="set model to the same directory in each recipe",
        )
    for number, recipe in enumerate(recipes):
        _check_trains(recipe, learned=how == "sequence" and number == 0)
    for name in () if how == "sequence" else SHARED_FIELDS:
        values = {str(getattr(recipe, name)) for recipe in recipes}
        if len(values) > 1:
            raise RecipeError(
                what=f"The recipes differ in {name}, and joint training opens one model for all",
                got=", ".join(sorted(values)),
                allowed=f"the same {name} in each recipe",
                fix=f"set {name} alike, or train one after the other (`expunge sequence`)",
            )


def _check_trains(recipe: Recipe, *, learned: bool) -> None:
    """Refuse an edit, and a learned trade-off unless it is ``learned`` in a run of its own."""
    method = method_of(recipe)
    if method.kind == "edit":
        raise RecipeError(
            what=f"{method.name} trains nothing, so it cannot be trained with another recipe",
            got=f"objective {method.name}, an edit",
            allowed="objectives; `expunge ls` lists them",
            fix="choose an objective",
        )
    if recipe.tradeoff == "learned" and not learned:
        raise RecipeError(
            what="A learned trade-off needs a run of its own",
            got=f"tradeoff learned, objective {method.name}",
            allowed="fixed or schedule; learned for the first of a sequence",
            fix="set tradeoff to fixed, with what a learned run found",
        )


def found(
    how: How, recipes: Sequence[Recipe], out: Path, *, progress: Progress, fresh: bool
) -> RunRecord | None:
    """The record, if ``out`` holds these very recipes, finished.

    Raises:
        DataError: ``out`` holds something else.
    """
    check_own(out)
    work = [name for name in WORK_NAMES if holds(out, name)]
    if fresh or not work:
        return None
    if _written(out) != _settings(how, recipes):
        raise DataError(
            what="The output folder holds something else than these recipes trained in this way",
            got=f"{out} with {', '.join(work)}",
            allowed="a new folder, or the same recipes to go on with what was interrupted",
            fix="choose another -o, or discard what is there with --fresh",
        )
    if not holds(out, RECORD_NAME):
        return None
    progress.say(f"{out} holds this, finished; --fresh trains it again")
    return RunRecord.load(out)


def claim(how: How, recipes: Sequence[Recipe], out: Path, *, fresh: bool) -> None:
    """Make ``out`` the folder of these recipes."""
    make_way(out, fresh=fresh)
    (out / RECIPE_NAME).unlink(missing_ok=True)
    plain = [recipe.model_dump(mode="json", exclude_none=True) for recipe in recipes]
    text = yaml.safe_dump({"how": how, "recipes": plain}, sort_keys=False, allow_unicode=True)
    write_text(out / RECIPES_NAME, text)


def _written(out: Path) -> list[str]:
    """What identifies the recipes of a folder; empty where there are none."""
    if not holds(out, RECIPES_NAME):
        return []
    raw = read_settings(out / RECIPES_NAME)
    recipes = [Recipe.build(settings) for settings in raw.get("recipes", [])]
    return _settings(raw.get("how", ""), recipes)


def _settings(how: str, recipes: Sequence[Recipe]) -> list[str]:
    return [how, *(recipe.fingerprint for recipe in recipes)]


def metadata(recipes: Sequence[Recipe], method: str, training: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch of several recipes tells of its origin.

    The functions are sorted, so that both orders of a sequence are of one function.
    """
    return {
        "function": " + ".join(sorted(recipe.function for recipe in recipes)),
        "objective": method,
        "seed": recipes[0].seed,
        "base_model": published(recipes[0].model),
        "recipes": [published_recipe(recipe) for recipe in recipes],
        "training": dict(training),
    }


def finish(recipes: Sequence[Recipe], out: Path) -> RunRecord:
    """Save the record of the patch in ``out``; it has no scores, those are each function's."""
    patch = Patch.load(out / PATCH_NAME)
    facts = dict(patch.metadata["training"])
    timing, data, looks = (facts.pop(name) for name in ("timing", "data", "looks"))
    record = RunRecord(
        function=patch.metadata["function"],
        objective=patch.metadata["objective"],
        seed=patch.metadata["seed"],
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance={
            "recipes": [recipe.model_dump(mode="json", exclude_none=True) for recipe in recipes],
            "base": {name: base.to_dict() for name, base in patch.base.items()},
            "data": data,
            **provenance.environment(),
        },
        training={**facts, "split_reads": {"validation": looks, "test": 0}},
    )
    record.save(out)
    (out / STATE_NAME).unlink(missing_ok=True)
    return record


def add_up(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by name, added up."""
    names = dict.fromkeys(name for timing in timings for name in timing)
    return {name: sum(timing.get(name, 0.0) for timing in timings) for name in names}
