"""Dangerous knowledge: texts to forget, texts to keep, questions on both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from expunge.data.sources import Loaded, read_questions, read_texts
from expunge.data.splits import HasContent, Splits, normalise, separate, split_by_content
from expunge.data.text import Question, Text
from expunge.functions.base import DataSettings, FunctionData, Measured, function
from expunge.records import Split

C = TypeVar("C", bound=HasContent)

# Splits hang on content alone, never on a run's seed: seeds must be measured on the same test.
SPLIT_SEED = 0
# Texts behind a perplexity or a nats/token: more would cost time and hardly narrow the interval.
MEASURED_TEXTS = 300


@function(
    "knowledge",
    source="arXiv:2403.03218 (WMDP), arXiv:2401.06121 (TOFU)",
    deviations="three splits by content hash; questions are divided into validation and test",
    objective="cosine-rmu",
)
def load_knowledge(settings: DataSettings) -> FunctionData:
    """Read, check and split the data of a knowledge run.

    With questions, all forget texts are trained on, since forgetting them is the point and the
    questions are what is held back. Without, a share of them is held back to be measured. Retain
    texts are always split, and those that hold the answer to a retain question are left out of
    training: what must stay is measured on what was not rehearsed.

    Raises:
        DataError: a source cannot be used, or forget and retain texts overlap.
    """
    reader = _Reader()
    topics = [reader.texts(source, settings.field) for source in settings.forget]
    sources = {source: reader.texts(source, settings.field) for source in settings.retain}
    questions = reader.questions(settings.questions)
    retain_questions = reader.questions(settings.retain_questions)
    fluent = reader.texts(settings.text, settings.field) if settings.text else None

    forgotten = [text for topic in topics for text in topic]
    kept = _split_retain(sources, [*forgotten, *questions], settings, reader.notes)
    # With questions, they are what is held back.
    forget = [
        Splits(tuple(topic), (), ()) if questions else _thirds(topic, settings) for topic in topics
    ]
    retain = _rehearsed(kept, retain_questions, settings, reader.notes)
    trained_on = {normalise(text.content) for text in (*forgotten, *retain)}
    documents = _documents(fluent, list(kept.values()), trained_on, reader.notes)

    asked, kept_asked = (_halves(one, settings) for one in (questions, retain_questions))
    measured: dict[Split, Measured] = {}
    for name in ("validation", "test"):
        held_back = [text for split in kept.values() for text in getattr(split, name)]
        measured[name] = Measured(
            forget_questions=getattr(asked, name),
            retain_questions=getattr(kept_asked, name),
            forget_texts=_pool([t for s in forget for t in getattr(s, name)], MEASURED_TEXTS),
            retain_texts=_pool(held_back, MEASURED_TEXTS),
            perplexity_texts=_pool(getattr(documents, name), MEASURED_TEXTS),
        )
    return FunctionData(
        forget=tuple(_pool(split.train, settings.max_texts) for split in forget),
        retain=retain,
        measured=measured,
        notes=tuple(reader.notes),
        hashes=reader.hashes,
    )


def _split_retain(
    sources: Mapping[str, Sequence[Text]],
    forgotten: Sequence[HasContent],
    settings: DataSettings,
    notes: list[str],
) -> dict[str, Splits[Text]]:
    """Each retain source split, without forget content and without what an earlier source holds."""
    kept: dict[str, Splits[Text]] = {}
    seen: set[str] = set()
    for source, texts in sources.items():
        clean, dropped = separate(forgotten, texts, on_overlap=settings.on_overlap)
        if dropped:
            notes.append(f"{source}: {dropped} texts dropped that are forget texts too")
        # Otherwise a text could be trained on from one source and measured from the other.
        new = [text for text in clean if normalise(text.content) not in seen]
        if len(new) < len(clean):
            notes.append(f"{source}: {len(clean) - len(new)} texts dropped that came before")
        seen.update(normalise(text.content) for text in new)
        kept[source] = _thirds(new, settings)
    return kept


def _rehearsed(
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
        retain.extend(_pool(unasked, per_source))
    return tuple(retain)


def _documents(
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


class _Reader:
    """Reads sources, remembering what was left out and the hash of each."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.hashes: dict[str, str] = {}

    def texts(self, source: str, field: str | None) -> tuple[Text, ...]:
        return self._remember(source, read_texts(source, field=field))

    def questions(self, source: str | None) -> tuple[Question, ...]:
        return () if source is None else self._remember(source, read_questions(source))

    def _remember(self, source: str, loaded: Loaded[C]) -> tuple[C, ...]:
        self.hashes[source] = loaded.sha256
        if loaded.skipped:
            self.notes.append(str(loaded))
        return loaded.items


def _halves(questions: Sequence[Question], settings: DataSettings) -> Splits[Question]:
    """Questions are for choices (validation) or for the result (test); none is trained on."""
    share = settings.validation_share
    return split_by_content(questions, train=0.0, validation=share, test=1 - share, seed=SPLIT_SEED)


def _thirds(texts: Sequence[Text], settings: DataSettings) -> Splits[Text]:
    share = settings.held_back_share
    return split_by_content(
        texts, train=1 - 2 * share, validation=share, test=share, seed=SPLIT_SEED
    )


def _pool(texts: Iterable[C], limit: int) -> tuple[C, ...]:
    """At most ``limit`` of them, picked by content and not by position or seed."""
    items = list(texts)
    if len(items) <= limit:
        return tuple(items)
    share = limit / len(items)
    return split_by_content(
        items, train=share, validation=0.0, test=1 - share, seed=SPLIT_SEED + 1
    ).train
