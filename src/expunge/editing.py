"""Baselines that need no training: an edit's inputs from a bench, its result as an artefact."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from expunge.edits import EDITS, EditInputs, Intervention
from expunge.evaluation.scorers import WordList
from expunge.learning import Learning
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
