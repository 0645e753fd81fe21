"""Looks on a bench: what is measured of a model while it is trained, and what guards a run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from expunge.cuts import Opened
from expunge.data.tokens import encode
from expunge.defaults import fitting_tokens
from expunge.errors import DataError
from expunge.evaluation.looks import LookKind, OutputLook, RepresentationLook
from expunge.functions.reading import pool
from expunge.learning import Learning, method_of, objective_of
from expunge.model.boundaries import BoundaryStore
from expunge.model.replay import Replay
from expunge.objectives.base import Logprobs
from expunge.progress import timed
from expunge.recipe import Recipe
from expunge.records import Split
from expunge.training.tradeoff import ranges_of
from expunge.training.watch import Watch

Look = OutputLook | RepresentationLook


def kind_of(recipe: Recipe) -> LookKind:
    """What looks measure: likelihood where the recipe leaves it open.

    On held-back questions the probability of the right choice told the accuracy on further ones
    better than accuracy did (LOG.md, "Looks by likelihood").
    """
    return "likelihood" if recipe.reward == "auto" else recipe.reward


def knob_ranges(recipe: Recipe) -> dict[str, Any]:
    """Of the knobs that a learned trade-off may set, whether they can move in this run or not."""
    return ranges_of(objective_of(recipe).extras["knobs"])


def look_at(
    learning: Learning,
    recipe: Recipe,
    kind: LookKind,
    *,
    split: Split = "validation",
    texts_only: bool = False,
    check: bool = True,
    most_texts: int | None = None,
) -> Look:
    """A look at held-back data; for one at what the model says, the whole is opened.

    What is looked at is picked by content, not by place, so that all topics and sources can be in
    it: ``look_items`` of each part at most, of texts of the rest fewer where questions are asked of
    it too (`texts_beside`). The base is measured once for all runs of a bench, and the layers below
    those that are trained run then alone.

    Args:
        texts_only: leave questions and pairs out.
        check: whether to refuse a base that answers no better than chance.
        most_texts: texts of a part, where ``look_items`` would be more; pairs are not counted.

    Raises:
        DataError: nothing to look at on a side, or a base that answers no better than chance.
    """
    held_back = learning.data.measured[split]
    most_texts = recipe.look_items if most_texts is None else min(most_texts, recipe.look_items)
    if kind == "representation":  # the bench refuses it for an objective that reads none
        return _representation(learning, recipe, split, most_texts)
    opened = learning.opened(recipe.model, None)
    asked = 0 if texts_only else len(held_back.retain_questions)
    retain_texts = min(texts_beside(recipe.look_items, asked), most_texts)
    key = (kind, split, texts_only, check, recipe.look_items, most_texts, recipe.max_tokens)
    look = learning.looks.get(key)
    replay = _replay(learning, recipe, opened, look)
    if look is None:
        some = partial(pool, limit=recipe.look_items)
        look = learning.looks[key] = OutputLook.of(
            opened.model,
            opened.tokenizer,
            kind,
            forget_questions=() if texts_only else some(held_back.forget_questions),
            retain_questions=() if texts_only else some(held_back.retain_questions),
            forget_texts=pool(held_back.forget_texts or learning.data.forgotten, most_texts),
            retain_texts=pool(held_back.retain_texts, retain_texts),
            pairs=() if texts_only else some(held_back.pairs),
            check=check,
            max_tokens=fitting_tokens(recipe.max_tokens, learning.checkpoint.config),
            replay=replay,
        )
    look.replay = replay
    return replace(look, raw={})


def texts_beside(items: int, questions: int) -> int:
    """How many texts of the rest a look of ``items`` reads, beside so many questions on it.

    A quarter, where there are at least as many questions. In what a point is worth, so few still
    tell what is kept with no more noise than the questions tell what is gone (LOG.md, "Texts of a
    look").
    """
    quarter = -(-items // 4)
    return quarter if questions >= quarter else items


def guard(learning: Learning, recipe: Recipe) -> Watch | None:
    """Looks that stop a run whose rest is lost; they cost no head where none is read."""
    if not recipe.look_every or not learning.data.measured["validation"].retain_texts:
        return None
    reads_head = isinstance(objective_of(recipe).extras["needs"], Logprobs)
    kind: LookKind = "likelihood" if reads_head else "representation"
    try:
        look = look_at(learning, recipe, kind, texts_only=True)
    except DataError as error:
        # The run itself needs nothing of what is held back.
        learning.progress.say(f"note: nothing guards against collapse: {error.what} ({error.got})")
        return None
    return Watch(look, recipe.look_every, recipe.collapse_floor, retain_floor=recipe.retain_floor)


def _replay(
    learning: Learning, recipe: Recipe, opened: Opened, look: OutputLook | None
) -> Replay | None:
    """Of the layers below those that a recipe trains, if there are any: the look's, or a new one.

    What looks of a bench keep together is a quarter of ``cache_gib`` at most.
    """
    first = 0 if method_of(recipe).kind == "edit" else min(learning.where(recipe).trained)
    if look is not None and look.replay is not None and look.replay.first == first:
        return look.replay
    others = [one.replay for one in learning.looks.values() if one is not look]
    kept = sum(replay.nbytes for replay in others if replay is not None)
    limit = int(recipe.cache_gib * 2**30 / 4) - kept
    return Replay(opened.model, opened.structure, first, limit_bytes=limit) if first else None


def _representation(
    learning: Learning, recipe: Recipe, split: Split, limit: int
) -> RepresentationLook:
    cut, (_, tokenizer) = learning.cut(recipe), learning.any_opened(recipe)
    key = (split, limit)
    if key not in cut.held_back:
        held_back = learning.data.measured[split]
        longest = fitting_tokens(recipe.max_tokens, learning.checkpoint.config)
        stores = []
        for texts in (held_back.forget_texts or learning.data.forgotten, held_back.retain_texts):
            encoded = encode(pool(texts, limit), tokenizer, max_tokens=longest)
            stores.append(
                BoundaryStore(
                    cut.segment,
                    [one.ids for one in encoded if len(one.ids) > 1],
                    reference=True,
                    limit_bytes=int(recipe.cache_gib * 2**30 / 4),
                    spill_directory=learning.spill_directory,
                    announce=learning.progress.say,
                )
            )
        with timed(learning.timing, "prefix"):
            for store in stores:
                store.compute()
        cut.held_back[key] = (stores[0], stores[1])
    return RepresentationLook(cut.segment, *cut.held_back[key])
