"""What language functions share in reading their data: sources, splits, and who may see what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from expunge.data.sources import (
    Loaded,
    read_labelled,
    read_pairs,
    read_prompts,
    read_questions,
    read_texts,
)
from expunge.data.splits import HasContent, Splits, normalise, separate, split_by_content
from expunge.data.text import Labelled, Pair, Question, Text
from expunge.errors import RecipeError
from expunge.functions.base import DataSettings

C = TypeVar("C", bound=HasContent)

# Splits hang on content alone, never on a run's seed: seeds must be measured on the same test.
SPLIT_SEED = 0
# Texts behind a perplexity or a nats/token: more would cost time and hardly narrow the interval.
MEASURED_TEXTS = 300

ROLES = {
    "forget": "texts to forget; a topic each",
    "retain": "texts to keep",
    "pairs": "toxic texts with their neutral wordings",
    "labelled": "texts labelled toxic or neutral, unpaired",
    "prompts": "prompts to be continued",
    "refusals": "what to say instead of the forgotten knowledge",
    "questions": "questions on the forgotten knowledge",
}


def require(settings: DataSettings, *roles: str) -> None:
    """Raise RecipeError for the first of the roles that the settings leave empty."""
    for role in roles:
        if not getattr(settings, role):
            raise RecipeError(
                what=f"The recipe lacks {role}",
                got="nothing",
                allowed=ROLES[role],
                fix=f"give --{role}, or `{role}:` in the recipe",
            )


def refuse(settings: DataSettings, function: str, instead: Mapping[str, str]) -> None:
    """Raise RecipeError for a role that the function does not know; it would be ignored.

    Args:
        instead: role -> what to do instead of giving it.
    """
    for role, fix in instead.items():
        value = getattr(settings, role)
        if value:
            raise RecipeError(
                what=f"The function {function} takes no {role}",
                got=f"{role}: {value if isinstance(value, str) else ', '.join(value)}",
                allowed=f"a recipe without {role}",
                fix=fix,
            )


def split_retain(
    sources: Mapping[str, Sequence[Text]],
    forgotten: Sequence[HasContent],
    settings: DataSettings,
    notes: list[str],
    *,
    before: Iterable[HasContent] = (),
) -> dict[str, Splits[Text]]:
    """Each retain source split, without forget content and without what an earlier source holds.

    Args:
        before: what came before the first source; it is split already.
    """
    kept: dict[str, Splits[Text]] = {}
    seen = {normalise(item.content) for item in before}
    for source, texts in sources.items():
        clean, dropped = separate(forgotten, texts, on_overlap=settings.on_overlap)
        if dropped:
            notes.append(f"{source}: {dropped} texts dropped that are forget texts too")
        # Otherwise a text could be trained on from one source and measured from the other.
        new = [text for text in clean if normalise(text.content) not in seen]
        if len(new) < len(clean):
            notes.append(f"{source}: {len(clean) - len(new)} texts dropped that came before")
        seen.update(normalise(text.content) for text in new)
        kept[source] = thirds(new, settings)
    return kept


def rehearsed(
    kept: Mapping[str, Splits[Text]],
    retain_questions: Sequence[Question],
    settings: DataSettings,
    notes: list[str],
) -> tuple[Text, ...]:
    """Retain texts to train on: none that answers a retain question, as many from each source."""
    asked = {normalise(question.content) for question in retain_questions}
    per_source = max(1, settings.max_texts // len(kept))
    retain: list[Text] = []
    for source, split in kept.items():
        unasked = [text for text in split.train if normalise(text.content) not in asked]
        if len(unasked) < len(split.train):
            count = len(split.train) - len(unasked)
            notes.append(f"{source}: {count} texts that answer a retain question held back")
        retain.extend(pool(unasked, per_source))
    return tuple(retain)


def documents(
    fluent: Sequence[Text] | None,
    kept: Sequence[Splits[Text]],
    trained_on: set[str],
    notes: list[str],
) -> Splits[Text]:
    """Texts for perplexity: those given, or plain held-back retain texts; never trained on."""
    if fluent is not None:
        unseen = [text for text in fluent if normalise(text.content) not in trained_on]
        if len(unseen) < len(fluent):
            count = len(fluent) - len(unseen)
            notes.append(f"{count} texts for perplexity dropped that are trained on")
        return split_by_content(unseen, train=0.0, validation=0.5, test=0.5, seed=SPLIT_SEED)
    held_back = {
        name: tuple(text for split in kept for text in getattr(split, name))
        for name in ("validation", "test")
    }
    plain = {
        name: tuple(text for text in texts if text.prompt_chars == 0) or texts
        for name, texts in held_back.items()
    }
    return Splits(train=(), **plain)


class Reader:
    """Reads sources, remembering what was left out and the hash of each."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.hashes: dict[str, str] = {}

    def texts(self, source: str, field: str | None) -> tuple[Text, ...]:
        return self._remember(source, read_texts(source, field=field))

    def questions(self, source: str | None) -> tuple[Question, ...]:
        return () if source is None else self._remember(source, read_questions(source))

    def pairs(self, source: str) -> tuple[Pair, ...]:
        return self._remember(source, read_pairs(source))

    def labelled(self, source: str, field: str | None) -> tuple[Labelled, ...]:
        return self._remember(source, read_labelled(source, field=field))

    def prompts(self, source: str | None) -> tuple[Text, ...]:
        return () if source is None else self._remember(source, read_prompts(source))

    def _remember(self, source: str, loaded: Loaded[C]) -> tuple[C, ...]:
        self.hashes[source] = loaded.sha256
        if loaded.skipped:
            self.notes.append(str(loaded))
        return loaded.items


def halves(items: Sequence[C], settings: DataSettings) -> Splits[C]:
    """Questions and prompts serve choices (validation) or the result (test), never training."""
    share = settings.validation_share
    return split_by_content(items, train=0.0, validation=share, test=1 - share, seed=SPLIT_SEED)


def thirds(items: Sequence[C], settings: DataSettings) -> Splits[C]:
    """Most for training, an equal share held back for each of validation and test."""
    share = settings.held_back_share
    return split_by_content(
        items, train=1 - 2 * share, validation=share, test=share, seed=SPLIT_SEED
    )


def pool(texts: Iterable[C], limit: int) -> tuple[C, ...]:
    """At most ``limit`` of them, picked by content and not by position or seed."""
    items = list(texts)
    if len(items) <= limit:
        return tuple(items)
    share = limit / len(items)
    return split_by_content(
        items, train=share, validation=0.0, test=1 - share, seed=SPLIT_SEED + 1
    ).train
