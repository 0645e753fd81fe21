"""One row of a data file → a `Pair`, `Labelled` texts or a prompt: data on how a thing is said.

Which columns make them is known here and nowhere else: ParaDetox, Jigsaw, Civil Comments,
RealToxicityPrompts, and plain text with a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from expunge.data.rows import Row, RowError, lookup, string
from expunge.data.splits import normalise
from expunge.data.text import Labelled, Pair, Text

PAIR_COLUMNS = "toxic + neutral, toxic + neutral1 (+ neutral2 + neutral3)"
LABELLED_COLUMNS = (
    "text or comment_text + one of label (toxic, neutral, 0, 1), the Jigsaw labels, toxicity or "
    "target (0 to 1); prompt.text + prompt.toxicity (+ continuation); or " + PAIR_COLUMNS
)
PROMPT_COLUMNS = "prompt.text, prompt, opening or text"

# The published tsv and the hub's table name them differently.
TOXIC_COLUMNS = ("toxic", "en_toxic_comment")
NEUTRAL_COLUMNS = ("neutral", "neutral1", "neutral2", "neutral3", "en_neutral_comment")
TEXT_NAMES = ("comment_text", "text")
JIGSAW_LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
RATINGS = ("toxicity", "target")
TOXIC_LABELS = ("toxic", "true", "yes", "1", "1.0")
NEUTRAL_LABELS = ("neutral", "non-toxic", "nontoxic", "not toxic", "false", "no", "0", "0.0")
UNLABELLED = ("-1", "-1.0")  # Jigsaw's mark for rows of its test set that nobody labelled


def to_pair(row: Row) -> Pair:
    """Make a pair of a row, by the columns of `PAIR_COLUMNS`; the first neutral one that is full.

    Raises:
        RowError: a column is missing, a side is empty, or both wordings are the same.
    """
    toxic = next((name for name in TOXIC_COLUMNS if name in row), None)
    neutral = [name for name in NEUTRAL_COLUMNS if name in row]
    if toxic is None or not neutral:
        raise RowError("no toxic column" if toxic is None else "no neutral column")
    written = [name for name in neutral if not _empty(row[name])]
    if not written or _empty(row[toxic]):
        missing = "neutral" if not written else "toxic"
        raise RowError(f"unpaired: no {missing} wording", malformed=False)
    pair = Pair(string(row, toxic), string(row, written[0]))
    if normalise(pair.toxic) == normalise(pair.neutral):
        raise RowError("both wordings are the same", malformed=False)
    return pair


def to_labelled(row: Row, field: str | None, threshold: float) -> Iterator[Labelled | RowError]:
    """Make labelled texts of a row, by the columns of `LABELLED_COLUMNS`.

    A row holds two texts where it is a pair, or a prompt with its continuation; of these one may
    be unusable without the other. A text of Jigsaw's is toxic if it has any of the six labels.

    Args:
        row: the row.
        field: the column of the text, its label beside it; ``prompt.text`` for a nested one.
        threshold: ratings from it on count as toxic.

    Raises:
        RowError: no text, no label, or a label that is neither.
    """
    if field is not None:
        parent = field.rpartition(".")[0] if field not in row else ""
        holder = lookup(row, parent) if parent else row
        text = string(row, field)
        yield Labelled(text, _is_toxic(holder, threshold))
    elif isinstance(row.get("prompt"), Mapping):
        for part in ("prompt", "continuation"):
            if isinstance(row.get(part), Mapping):
                try:
                    text = string(row, f"{part}.text")
                    yield Labelled(text, _is_toxic(row[part], threshold))
                except RowError as error:
                    yield RowError(f"{part}: {error.reason}", malformed=error.malformed)
    elif name := next((name for name in TEXT_NAMES if name in row), None):
        text = string(row, name)
        yield Labelled(text, _is_toxic(row, threshold))
    elif any(name in row for name in NEUTRAL_COLUMNS):
        pair = to_pair(row)
        yield Labelled(pair.toxic, toxic=True)
        yield Labelled(pair.neutral, toxic=False)
    else:
        raise RowError("no text column")


def to_prompt(row: Row) -> Text:
    """Make a prompt of a row, by the columns of `PROMPT_COLUMNS`.

    Raises:
        RowError: the row has none of them, or no string there.
    """
    if isinstance(row.get("prompt"), Mapping):
        return Text(string(row, "prompt.text"))
    for name in ("prompt", "opening", "text"):
        if name in row:
            return Text(string(row, name))
    raise RowError("no prompt column")


def _is_toxic(row: Row, threshold: float) -> bool:
    """The class of a row: by its label, its Jigsaw labels or its rating, in this order."""
    if "label" in row:
        return _label(row, "label")
    if "toxic" in row:
        return any([_label(row, name) for name in JIGSAW_LABELS if name in row])
    for name in RATINGS:
        if name in row:
            return _rating(row, name) >= threshold
    raise RowError("no label column")


def _label(row: Row, name: str) -> bool:
    value = row[name]
    if _empty(value):
        raise RowError(f"no {name}", malformed=False)
    label = str(value).strip().casefold()
    if label in UNLABELLED:
        raise RowError("not labelled (-1)", malformed=False)
    if label not in TOXIC_LABELS + NEUTRAL_LABELS:
        raise RowError(f"{name} {label[:40]!r} is not toxic, neutral, true, false, 1 or 0")
    return label in TOXIC_LABELS


def _rating(row: Row, name: str) -> float:
    value = row[name]
    if _empty(value):
        raise RowError(f"no {name}", malformed=False)
    try:
        rating = float(value)
    except (TypeError, ValueError, OverflowError):
        rating = math.nan
    if not 0 <= rating <= 1:
        raise RowError(f"{name} {str(value)[:40]!r} is not a number from 0 to 1")
    return rating


def _empty(value: object) -> bool:
    """A cell that holds nothing, in the ways of csv, JSON and parquet."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))
