"""Baselines that need no training: an edit's inputs from a bench, its result as an artefact."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from typing import Any

from expunge.edits import EDITS, EditInputs, Intervention
from expunge.errors import ExpungeError
from expunge.evaluation.scorers import WordList
from expunge.learning import Learning
from expunge.metalearning.looking import kind_of, look_at
from expunge.model.patch import Patch, causal_lm_name
from expunge.recipe import Recipe
from expunge.registry import settings_of


def make_edit(learning: Learning, recipe: Recipe) -> Patch | Intervention:
    """What the recipe's edit makes of the base: a patch, or what acts while the model runs.

    Raises:
        ExpungeError: the edit cannot use the data or a setting.
    """
    entry = EDITS.get(str(recipe.objective))
    opened = learning.opened(recipe.model, None)
    tokens = learning.tokens(recipe)
    start = time.perf_counter()
    given = EditInputs(
        model=opened.model,
        structure=opened.structure,
        tokenizer=opened.tokenizer,
        toxic=[ids for topic in tokens.forget for ids in topic],
        neutral=tokens.contrast,
        paired=learning.data.paired,
        words=_words(learning) if entry.extras["needs_words"] else (),
    )
    made = entry.part(given, **settings_of(entry, recipe.objective_settings))
    timing = {**learning.since_last(), "train": time.perf_counter() - start}
    facts = {"data": learning.data_hashes, "timing": timing, "n_forget_texts": len(given.toxic)}
    if isinstance(made, Intervention):
        metadata = learning.metadata(recipe, entry.name, facts)
        return replace(made, metadata={**made.metadata, **metadata})  # type: ignore[type-var]
    return _patch(learning, recipe, entry.name, opened.model, dict(made), facts)


def search_edit(learning: Learning, recipe: Recipe) -> Patch | Intervention:
    """The edit with those of its registered choices that are worth most on validation.

    Raises:
        ExpungeError: as `make_edit`, for the first choice; later ones that cannot be made are left
            out and told.
    """
    entry = EDITS.get(str(recipe.objective))
    settings = {name: list(values) for name, values in entry.extras["choices"].items()}
    look = look_at(learning, recipe, kind_of(recipe))
    model = learning.opened(recipe.model, None).model
    tried: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], int, Patch | Intervention] | None = None
    combinations = [dict(zip(settings, some, strict=True)) for some in product(*settings.values())]
    with learning.progress.phase("settings", len(combinations)) as advance:
        for chosen in combinations:
            own = recipe.updated(objective_settings={**recipe.objective_settings, **chosen})
            try:
                made = make_edit(learning, own)
            except ExpungeError as error:
                if not tried:
                    raise
                learning.progress.say(f"note: {chosen} is left out: {error.what} ({error.got})")
                continue
            with made.applied(model):
                point = look()
            worth = point.worth(recipe.retain_floor)
            tried.append({"settings": chosen, **point._asdict(), "worth": worth})
            rank = (worth, point.worth(0.0))
            if best is None or rank > best[0]:
                best = (rank, len(tried) - 1, made)
            advance(1)
    assert best is not None
    _, place, made = best
    facts = {"kind": "search", "tried": tried, "chosen": tried[place], "inner_steps": 0}
    training = {**made.metadata["training"], "tradeoff": facts, "looks": len(tried)}
    return replace(made, metadata={**made.metadata, "training": training})  # type: ignore[type-var]


def _words(learning: Learning) -> tuple[str, ...]:
    """Words that tell toxic from neutral training texts."""
    return WordList.from_labelled(learning.data.labelled).words


def _patch(
    learning: Learning,
    recipe: Recipe,
    name: str,
    model: Any,
    changed: dict[str, Any],
    facts: dict[str, Any],
) -> Patch:
    parameters = dict(model.named_parameters())
    learning.check_dtype(model, {own: parameters[own] for own in changed})
    names = {own: causal_lm_name(model, own) for own in changed}
    before = {names[own]: parameters[own].detach().cpu() for own in changed}
    after = {names[own]: weight.detach().cpu() for own, weight in changed.items()}
    return Patch.between(
        before,
        after,
        base=learning.checkpoint.base_tensors(after),
        metadata=learning.metadata(recipe, name, facts),
    )
