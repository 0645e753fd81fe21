"""Dangerous knowledge: texts to forget, texts to keep, questions on both.

With ``refusals`` each forget text has a twin, the same beginning and then a refusal, for objectives
that want pairs. Without, probes tell the forget texts from the retain texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from expunge.data.refusals import twin_of
from expunge.data.splits import Splits, normalise
from expunge.data.text import Text
from expunge.errors import RecipeError
from expunge.functions.base import DataSettings, FunctionData, Measured, function
from expunge.functions.reading import (
    MEASURED_TEXTS,
    Reader,
    documents,
    halves,
    pool,
    refuse,
    rehearsed,
    require,
    split_retain,
    thirds,
)
from expunge.records import Split

ELSEWHERE = "leave it out, or choose --function toxicity"


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
        RecipeError: there are no forget or no retain texts, data of another function, or refusals
            for several topics.
        DataError: a source cannot be used, or forget and retain texts overlap.
    """
    _check(settings)
    reader = Reader()
    topics = [reader.texts(source, settings.field) for source in settings.forget]
    sources = {source: reader.texts(source, settings.field) for source in settings.retain}
    questions = reader.questions(settings.questions)
    retain_questions = reader.questions(settings.retain_questions)
    fluent = reader.texts(settings.text, settings.field) if settings.text else None

    forgotten = [text for topic in topics for text in topic]
    kept = split_retain(sources, [*forgotten, *questions], settings, reader.notes)
    # With questions, they are what is held back.
    forget = [
        Splits(tuple(topic), (), ()) if questions else thirds(topic, settings) for topic in topics
    ]
    retain = rehearsed(kept, retain_questions, settings, reader.notes)
    trained_on = {normalise(text.content) for text in (*forgotten, *retain)}
    unseen = documents(fluent, list(kept.values()), trained_on, reader.notes)

    asked, kept_asked = (halves(one, settings) for one in (questions, retain_questions))
    measured: dict[Split, Measured] = {}
    for name in ("validation", "test"):
        held_back = [text for split in kept.values() for text in getattr(split, name)]
        measured[name] = Measured(
            forget_questions=getattr(asked, name),
            retain_questions=getattr(kept_asked, name),
            forget_texts=pool([t for s in forget for t in getattr(s, name)], MEASURED_TEXTS),
            retain_texts=pool(held_back, MEASURED_TEXTS),
            perplexity_texts=pool(getattr(unseen, name), MEASURED_TEXTS),
        )
    trained = tuple(pool(split.train, settings.max_texts) for split in forget)
    twins = _twins(settings, trained, reader)
    return FunctionData(
        forget=trained,
        retain=retain,
        measured=measured,
        contrast=twins,
        paired=bool(twins),
        notes=tuple(reader.notes),
        hashes=reader.hashes,
    )


def _check(settings: DataSettings) -> None:
    require(settings, "forget", "retain")
    refuse(settings, "knowledge", dict.fromkeys(("pairs", "labelled", "prompts"), ELSEWHERE))
    if settings.refusals is not None and len(settings.forget) > 1:
        raise RecipeError(
            what="Refusals make pairs, and pairs belong to one topic",
            got=f"refusals, and {len(settings.forget)} topics: {', '.join(settings.forget)}",
            allowed="refusals with one source of texts to forget",
            fix="put all texts to forget into one file, or leave refusals out",
        )


def _twins(
    settings: DataSettings, topics: Sequence[Sequence[Text]], reader: Reader
) -> tuple[Text, ...]:
    """Each forget text's twin that refuses, index by index; none without refusals."""
    if settings.refusals is None:
        return ()
    refusals = [refusal.text for refusal in reader.texts(settings.refusals, None)]
    return tuple(twin_of(text, refusals) for text in topics[0])
