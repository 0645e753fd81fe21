"""Dangerous knowledge: texts to forget, texts to keep, questions on both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    kept_sources = [reader.texts(source, settings.field) for source in settings.retain]
    questions = reader.questions(settings.questions)
    retain_questions = reader.questions(settings.retain_questions)
    forget_questions = _halves(questions, settings)
    kept_questions = _halves(retain_questions, settings)

    forgotten = [text for topic in topics for text in topic]
    kept: list[Splits[Text]] = []
    for source, texts in zip(settings.retain, kept_sources, strict=True):
        clean, dropped = separate(forgotten, texts, on_overlap=settings.on_overlap)
        if dropped:
            reader.notes.append(f"{source}: {dropped} texts dropped that are forget texts too")
        kept.append(_thirds(clean, settings))
    topic_splits = [
        Splits(train=tuple(topic), validation=(), test=())
        if questions
        else _thirds(topic, settings)
        for topic in topics
    ]
    asked = {normalise(question.content) for question in retain_questions}
    per_source = max(1, settings.max_texts // len(kept))
    retain: list[Text] = []
    for source, split in zip(settings.retain, kept, strict=True):
        unasked = [text for text in split.train if normalise(text.content) not in asked]
        if len(unasked) < len(split.train):
            count = len(split.train) - len(unasked)
            reader.notes.append(f"{source}: {count} texts that answer a retain question held back")
        retain.extend(_pool(unasked, per_source))

    fluent = reader.texts(settings.text, settings.field) if settings.text else None
    measured: dict[Split, Measured] = {}
    for name in ("validation", "test"):
        held_back = [text for split in kept for text in getattr(split, name)]
        documents = [text for text in held_back if text.prompt_chars == 0] or held_back
        if fluent is not None:
            halves = split_by_content(fluent, train=0.0, validation=0.5, test=0.5, seed=SPLIT_SEED)
            documents = list(getattr(halves, name))
        measured[name] = Measured(
            forget_questions=getattr(forget_questions, name),
            retain_questions=getattr(kept_questions, name),
            forget_texts=_pool([t for s in topic_splits for t in getattr(s, name)], MEASURED_TEXTS),
            retain_texts=_pool(held_back, MEASURED_TEXTS),
            perplexity_texts=_pool(documents, MEASURED_TEXTS),
        )
    return FunctionData(
        forget=tuple(_pool(split.train, settings.max_texts) for split in topic_splits),
        retain=tuple(retain),
        measured=measured,
        notes=tuple(reader.notes),
        hashes=reader.hashes,
    )


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
