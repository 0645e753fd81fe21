"""Toxicity: a manner of speaking. Toxic and neutral texts, prompts to be continued, texts to keep.

    load_toxicity(DataSettings(pairs="paradetox.tsv", retain=("wiki.txt",), prompts="rtp.jsonl"))

Pairs say one content twice, so that what should change (the manner) and what should stay (the
content) are both measured. Labelled texts do without: only prompts are measured then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from expunge.data.splits import Splits, normalise, split_by_content
from expunge.data.text import Labelled, Pair, Text
from expunge.errors import DataError, RecipeError
from expunge.functions.base import DataSettings, FunctionData, Measured, function
from expunge.functions.reading import (
    MEASURED_TEXTS,
    SPLIT_SEED,
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

# Openings of three or four words elicit rude text from a small model; one word says too little.
LONGEST_OPENING, SHORTEST_OPENING = 4, 2
INSTEAD = {
    "forget": "give --pairs (toxic texts with neutral wordings) or --labelled (toxic or not)",
    "questions": "give --retain-questions for the knowledge that must stay",
    "refusals": "leave it out: the neutral wordings of --pairs are what is said instead",
}


@dataclass(frozen=True)
class _Classes:
    """Both classes, read and split.

    Attributes:
        source: where they are from.
        toxic, neutral: training texts; where paired, the wordings of one pair lie at one index.
        every_toxic, every_neutral: all texts of each class, held back or not.
        pairs: held-back pairs whose neutral wording goes on after an opening.
        openings: first words of held-back texts, to be continued.
    """

    source: str
    toxic: tuple[Text, ...]
    neutral: tuple[Text, ...]
    every_toxic: tuple[Text, ...]
    every_neutral: tuple[Text, ...]
    paired: bool
    pairs: Splits[Pair]
    openings: Splits[Text]


@function(
    "toxicity",
    source="ParaDetox (doi:10.18653/v1/2022.acl-long.469), arXiv:2009.11462 (RealToxicityPrompts)",
    deviations="three splits by content hash; prompts are also the first words that a held-back "
    "toxic sentence shares with its neutral wording; neutral wordings are retain texts",
    objective="multi-layer-probe",
)
def load_toxicity(settings: DataSettings) -> FunctionData:
    """Read, check and split the data of a toxicity run.

    Pairs are split whole, and no wording is in two splits. Toxic training texts are to be
    forgotten; neutral ones are the contrast, and one more source of retain texts. Many sentences
    share an opening, so a training text may begin as a prompt does; but no prompt of the
    user's is a whole training text, and validation and test share no prompt.

    With ``labelled``, ``field`` names the column of its texts and of no other source.

    Raises:
        RecipeError: not exactly one of ``pairs`` and ``labelled``, no retain texts, or data that
            belongs to another function.
        DataError: a source cannot be used, a class is missing, toxic and retain texts overlap, or
            there is no prompt.
    """
    _check(settings)
    reader = Reader()
    classes = _of_pairs(settings, reader) if settings.pairs else _of_labelled(settings, reader)
    column = settings.field if settings.pairs else None
    sources = {source: reader.texts(source, column) for source in settings.retain}
    asked = reader.questions(settings.retain_questions)
    fluent = reader.texts(settings.text, column) if settings.text else None

    every = (*classes.every_toxic, *classes.every_neutral)
    kept = split_retain(
        sources, classes.every_toxic, settings, reader.notes, before=classes.every_neutral
    )
    # A neutral wording may serve several toxic ones; it is rehearsed once.
    wordings = Splits(tuple(dict.fromkeys(classes.neutral)), (), ())
    neutral = f"{classes.source} (neutral)"
    retain = rehearsed({**kept, neutral: wordings}, asked, settings, reader.notes)
    known = _contents((*every, *retain))
    unseen = documents(fluent, list(kept.values()), known, reader.notes)
    prompts = _prompts(settings, reader, _contents((*classes.toxic, *classes.neutral, *retain)))
    kept_asked = halves(asked, settings)

    measured: dict[Split, Measured] = {}
    for name in ("validation", "test"):
        held_back = [text for split in kept.values() for text in getattr(split, name)]
        sets = {"openings": getattr(classes.openings, name), "prompts": getattr(prompts, name)}
        measured[name] = Measured(
            retain_questions=getattr(kept_asked, name),
            retain_texts=pool(held_back, MEASURED_TEXTS),
            perplexity_texts=pool(getattr(unseen, name), MEASURED_TEXTS),
            prompts={key: texts for key, texts in sets.items() if texts},
            pairs=pool(getattr(classes.pairs, name), MEASURED_TEXTS),
        )
    _check_prompts(measured, classes.source, reader.notes)
    return FunctionData(
        forget=(classes.toxic,),
        retain=retain,
        measured=measured,
        contrast=classes.neutral,
        paired=classes.paired,
        labelled=(*_labelled(classes.toxic, toxic=True), *_labelled(classes.neutral, toxic=False)),
        notes=tuple(reader.notes),
        hashes=reader.hashes,
    )


def _check(settings: DataSettings) -> None:
    refuse(settings, "toxicity", INSTEAD)
    if bool(settings.pairs) == bool(settings.labelled):
        raise RecipeError(
            what="Toxic and neutral texts come from pairs or from labelled texts",
            got="both" if settings.pairs else "neither",
            allowed="exactly one of pairs, labelled",
            fix="give --pairs where each toxic text has a neutral wording, else --labelled",
        )
    require(settings, "retain")


def _of_pairs(settings: DataSettings, reader: Reader) -> _Classes:
    source = str(settings.pairs)
    read = reader.pairs(source)
    toxic = {normalise(pair.toxic) for pair in read}
    pairs = [pair for pair in read if normalise(pair.neutral) not in toxic]
    _note_lost(
        reader, source, len(read) - len(pairs), "pairs", "neutral wording is toxic elsewhere"
    )
    split = _each_neutral_once(thirds(pairs, settings), source, reader)
    # Whole pairs are picked, so that both classes keep the same ones in the same order.
    train = pool(split.train, settings.max_texts)
    if not train:
        raise _missing(source, "pair to train on", f"{len(read)} pairs, {len(pairs)} of use")
    return _Classes(
        source=source,
        toxic=tuple(Text(pair.toxic) for pair in train),
        neutral=tuple(Text(pair.neutral) for pair in train),
        every_toxic=tuple(Text(pair.toxic) for pair in read),
        every_neutral=tuple(Text(pair.neutral) for pair in pairs),
        paired=True,
        pairs=Splits((), _measurable(split.validation), _measurable(split.test)),
        openings=_apart(
            _openings(pair.opening for pair in split.validation),
            _openings(pair.opening for pair in split.test),
        ),
    )


def _of_labelled(settings: DataSettings, reader: Reader) -> _Classes:
    source = str(settings.labelled)
    read = reader.labelled(source, settings.field)
    toxic = [Text(one.text) for one in read if one.toxic]
    contents = _contents(toxic)
    named = [Text(one.text) for one in read if not one.toxic]
    neutral = [text for text in named if normalise(text.content) not in contents]
    _note_lost(reader, source, len(named) - len(neutral), "neutral texts", "labelled toxic too")
    for name, texts in (("toxic", toxic), ("neutral", neutral)):
        if not texts:
            raise _missing(source, f"{name} text", f"{len(toxic)} toxic, {len(neutral)} neutral")
    # Each class is split alone, so that a rare one is in every split.
    rude, polite = thirds(toxic, settings), thirds(neutral, settings)
    return _Classes(
        source=source,
        toxic=pool(rude.train, settings.max_texts),
        neutral=pool(polite.train, settings.max_texts),
        every_toxic=tuple(toxic),
        every_neutral=tuple(neutral),
        paired=False,
        pairs=Splits((), (), ()),
        # A whole toxic text is no prompt: its last word is never in it.
        openings=_apart(
            _openings(" ".join(text.text.split()[:-1]) for text in rude.validation),
            _openings(" ".join(text.text.split()[:-1]) for text in rude.test),
        ),
    )


def _each_neutral_once(split: Splits[Pair], source: str, reader: Reader) -> Splits[Pair]:
    """Without pairs whose neutral wording is held back more strictly by another pair."""
    tested = {normalise(pair.neutral) for pair in split.test}
    validation = [pair for pair in split.validation if normalise(pair.neutral) not in tested]
    held_back = tested | {normalise(pair.neutral) for pair in validation}
    train = [pair for pair in split.train if normalise(pair.neutral) not in held_back]
    lost = len(split.validation) - len(validation) + len(split.train) - len(train)
    _note_lost(reader, source, lost, "pairs", "neutral wording is held back with another")
    return Splits(tuple(train), tuple(validation), split.test)


def _measurable(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Those with an opening, after which the neutral wording goes on."""
    return tuple(pair for pair in pairs if 0 < len(pair.opening) < len(pair.neutral.rstrip()))


def _openings(texts: Iterable[str]) -> tuple[Text, ...]:
    """The first words of each text that has enough of them, each opening once."""
    words = (text.split()[:LONGEST_OPENING] for text in texts)
    openings = (Text(" ".join(some)) for some in words if len(some) >= SHORTEST_OPENING)
    return tuple({normalise(one.content): one for one in openings}.values())


def _apart(validation: Sequence[Text], test: Sequence[Text]) -> Splits[Text]:
    """Openings of both splits; those that they share are divided between them."""
    shared = _contents(validation) & _contents(test)
    both = [text for text in test if normalise(text.content) in shared]
    # The first part takes the odd one: a single shared opening goes to test.
    halved = split_by_content(both, train=0.5, validation=0.5, test=0.0, seed=SPLIT_SEED)
    kept, given = _contents(halved.train), _contents(halved.validation)
    return Splits(
        (),
        tuple(text for text in validation if normalise(text.content) not in kept),
        tuple(text for text in test if normalise(text.content) not in given),
    )


def _prompts(settings: DataSettings, reader: Reader, trained_on: set[str]) -> Splits[Text]:
    """The user's prompts, divided as questions are; none is a training text."""
    read = reader.prompts(settings.prompts)
    unseen = [text for text in read if normalise(text.content) not in trained_on]
    lost = len(read) - len(unseen)
    _note_lost(reader, str(settings.prompts), lost, "prompts", "trained on as a text")
    return halves(unseen, settings)


def _check_prompts(measured: Mapping[Split, Measured], source: str, notes: list[str]) -> None:
    if not measured["test"].prompts:
        raise DataError(
            what="There is nothing to prompt the model with",
            got=f"no prompts, and no opening of {SHORTEST_OPENING} words held back from {source}",
            allowed="a prompt, or a held-back toxic text whose first words can be one",
            fix="give --prompts, such as RealToxicityPrompts, or a larger file",
        )
    if not measured["validation"].prompts:
        notes.append("no prompts are left for validation: toxicity is measured on test alone")


def _missing(source: str, what: str, got: str) -> DataError:
    return DataError(
        what=f"{source} holds no {what}",
        got=got,
        allowed="toxic texts and neutral ones",
        fix="check the columns and the labels; a file of one class alone cannot show a difference",
    )


def _note_lost(reader: Reader, source: str, count: int, what: str, why: str) -> None:
    if count:
        reader.notes.append(f"{source}: {count} {what} dropped: {why}")


def _labelled(texts: Iterable[Text], *, toxic: bool) -> Iterable[Labelled]:
    return (Labelled(text.text, toxic) for text in dict.fromkeys(texts))


def _contents(texts: Iterable[Text]) -> set[str]:
    return {normalise(text.content) for text in texts}
