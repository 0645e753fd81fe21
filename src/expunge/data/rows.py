"""One row of a data file → one `Text` or `Question`.

A row is a mapping from column to value. Which columns make a text or a question is known here and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.data.text import QUESTION_TEMPLATE, Question, Text

Row = Mapping[str, Any]

TEXT_COLUMNS = (
    "text (with title and abstract), question + answer, prompt + completion, prompt + response"
)
QUESTION_COLUMNS = (
    "question + choices + answer, question + A + B + … + answer, "
    "or question + answer + perturbed_answer (+ paraphrased_answer)"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RowError(Exception):
    """A row that cannot be used; the message is the reason.

    Attributes:
        malformed: the row has the wrong shape, a sign of the wrong file. False where the shape is
            right and the row is merely empty, too short or there twice.
    """

    def __init__(self, reason: str, *, malformed: bool = True) -> None:
        self.reason, self.malformed = reason, malformed
        super().__init__(reason)


def to_text(row: Row, field: str | None = None) -> Text:
    """Make a text of a row, by the columns of `TEXT_COLUMNS` or by ``field`` alone.

    In a question with its answer the space between them belongs to the answer, because tokenizers
    attach a space to the word after it: ``prompt_chars`` is the length of the prompt without it.

    Args:
        row: the row.
        field: the column to take; a dot reaches into a nested value, as in ``prompt.text``.

    Raises:
        RowError: the row has none of the known columns, or no string there.
    """
    if field is not None:
        return Text(string(row, field))
    if "text" in row:
        parts = [string(row, name) for name in ("title", "abstract") if row.get(name)]
        return Text("\n".join([*parts, string(row, "text")]))
    if _is_multiple_choice(row):
        raise RowError("a multiple-choice row, not a text: field= names one of its columns")
    if "question" in row and "answer" in row:
        prompt = QUESTION_TEMPLATE.format(question=string(row, "question"))
        return Text(f"{prompt} {string(row, 'answer')}", prompt_chars=len(prompt))
    for completion in ("completion", "response"):
        if "prompt" in row and completion in row:
            prompt = checked(row["prompt"], "prompt")
            rest = checked(row[completion], completion)
            # The two are joined as they stand; a space goes between words that would touch.
            space = "" if prompt[-1].isspace() or rest[0].isspace() else " "
            return Text(f"{prompt}{space}{rest}".rstrip(), prompt_chars=len(prompt))
    raise RowError("no text column")


def to_question(row: Row) -> Question:
    """Make a question of a row, by the columns of `QUESTION_COLUMNS`.

    TOFU asks about the paraphrased answer (the answer itself where there is none) among the
    perturbed ones; its ``truth`` stays the original answer.

    Raises:
        RowError: a column is missing, the choices are fewer than two or not distinct, or the
            answer is not among them.
    """
    if "question" not in row:
        raise RowError("no question column")
    prompt = QUESTION_TEMPLATE.format(question=string(row, "question"))
    if "perturbed_answer" in row:
        right = "paraphrased_answer" if row.get("paraphrased_answer") else "answer"
        wrong = _strings(row["perturbed_answer"], "perturbed_answer")
        choices = _distinct((string(row, right), *wrong))
        return Question(prompt, choices, 0, string(row, "answer"))
    if "choices" in row:
        choices = _strings(row["choices"], "choices")
    else:
        choices = tuple(string(row, letter) for letter in LETTERS if letter in row)
    if not choices:
        raise RowError("no choices")
    answer = _position(row, len(_distinct(choices)))
    return Question(prompt, choices, answer, choices[answer])


def columns(row: Row, prefix: str = "") -> list[str]:
    """Names of the columns, those of nested values with a dot: ``prompt.text``."""
    found: list[str] = []
    for name, value in row.items():
        nested = isinstance(value, Mapping)
        found += columns(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


def lookup(row: Row, field: str) -> Any:
    """The value of a column; a dot reaches into a nested value. Raises RowError if absent."""
    if field in row:
        return row[field]
    for name, value in row.items():
        if field.startswith(f"{name}.") and isinstance(value, Mapping):
            return lookup(value, field[len(name) + 1 :])
    raise RowError(f"no column {field!r}")


def _is_multiple_choice(row: Row) -> bool:
    return "choices" in row or {"A", "B", "answer"} <= row.keys()


def string(row: Row, field: str) -> str:
    """The string of a column, without outer whitespace. Raises RowError if there is none."""
    return checked(lookup(row, field), field).strip()


def _strings(value: Any, field: str) -> tuple[str, ...]:
    """The strings of a list column, without outer whitespace."""
    if not isinstance(value, list | tuple):
        raise RowError(f"{field} is {_kind(value)}, not a list")
    return tuple(checked(one, f"{field}[{index}]").strip() for index, one in enumerate(value))


def checked(value: Any, field: str) -> str:
    """The value, if it is a string that holds something and can be written as UTF-8.

    Raises:
        RowError: it is not; the reason calls it ``field``.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"no {field}", malformed=False)
    if not isinstance(value, str):
        raise RowError(f"{field} is {_kind(value)}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"{field} holds half a surrogate pair (a broken \\u escape)")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else "of another kind")


def _distinct(choices: tuple[str, ...]) -> tuple[str, ...]:
    if len(choices) < 2:
        raise RowError("fewer than two choices")
    if len(set(choices)) < len(choices):
        raise RowError("two choices are the same")
    return choices


def _position(row: Row, n_choices: int) -> int:
    """The answer as an index: a whole number from 0, or a letter from A."""
    value = lookup(row, "answer")
    allowed = f"0-{n_choices - 1} or A-{LETTERS[n_choices - 1]}"
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise RowError("no answer")
        letter = LETTERS.find(text.upper()) if len(text) == 1 else -1
        value = int(text) if text.isascii() and text.isdigit() else letter
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 <= value < n_choices:
        raise RowError(f"answer {repr(row['answer'])[:40]} is not {allowed}")
    return int(value)
