"""Read texts, questions, pairs and labelled texts from files, folders and the Hugging Face hub.

    read_texts("forget.jsonl")                     text, question + answer, prompt + completion, …
    read_texts("train.csv", field="comment_text")  any column, nested ones with a dot
    read_questions("mmlu.csv")                     MMLU, WMDP and TOFU columns
    read_pairs("paradetox.tsv")                    toxic and neutral wordings of one content
    read_labelled("jigsaw.csv")                    texts that are toxic or not
    read_prompts("prompts.jsonl")                  RealToxicityPrompts, or a prompt a line

Real files have bad rows. They are skipped, counted and named with their reason, never lost in
silence; a file with more bad rows than good ones is the wrong file and raises.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from expunge.data import tables
from expunge.data.formats import READERS, NumberedRow, decode
from expunge.data.manners import (
    LABELLED_COLUMNS,
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    to_labelled,
    to_pair,
    to_prompt,
)
from expunge.data.rows import (
    QUESTION_COLUMNS,
    TEXT_COLUMNS,
    Row,
    RowError,
    columns,
    lookup,
    to_question,
    to_text,
)
from expunge.data.text import Labelled, Pair, Question, Text
from expunge.errors import DataError, RecipeError
from expunge.files import local_path

T = TypeVar("T")

PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}
SUFFIXES = (*READERS, ".parquet")
NAMED_ROWS = 3  # skipped rows that a summary names


@dataclass(frozen=True)
class Skipped:
    """A row that was not used.

    Attributes:
        row: its number as an editor or a spreadsheet shows it, from 1: the line of a text file,
            the record of a csv or tsv with the header as row 1, the position elsewhere.
        reason: why, in a few words.
    """

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.reason})"


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What was read, and what was not.

    Attributes:
        items: what was read, in the order of the source.
        source: the path or the hub name as it was given.
        sha256: of the file's bytes; of the rows as sorted JSON lines for a folder or a hub name.
        skipped: rows that were not used. With a limit, only those met before it was reached. Of a
            row that holds two labelled texts each counts.
    """

    items: tuple[T, ...]
    source: str
    sha256: str
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        """One line: ``forget.csv: 3 of 200 rows skipped: row 12 (no answer), …``."""
        rows = len(self.items) + len(self.skipped)
        if not self.skipped:
            return f"{self.source}: {rows} rows, none skipped"
        return f"{self.source}: {len(self.skipped)} of {rows} rows skipped: {_named(self.skipped)}"


def read_texts(
    source: str | Path, *, field: str | None = None, min_chars: int = 1, limit: int | None = None
) -> Loaded[Text]:
    """Read texts; exact duplicates are dropped and counted as skipped.

    Args:
        source: a file, a folder, or ``owner/name[:config][:split]`` on the hub.
        field: the column to take, ``prompt.text`` for a nested one; None: known columns.
        min_chars: shorter texts are skipped, in characters.
        limit: read no further once so many texts are there; None: all of them.

    Raises:
        DataError: the source is missing, unreadable, of an unknown format, or mostly malformed.
        RecipeError: ``min_chars`` or ``limit`` is below 1.
    """
    _at_least_one("min_chars", min_chars)

    def make(row: Row) -> Text:
        text = to_text(row, field)
        if len(text.text) < min_chars:
            raise RowError(f"shorter than {min_chars} characters", malformed=False)
        return text

    return _read(source, make, limit, TEXT_COLUMNS, with_field=True)


def read_questions(source: str | Path, *, limit: int | None = None) -> Loaded[Question]:
    """Read multiple-choice questions; exact duplicates are dropped and counted as skipped.

    Args and errors as for `read_texts`.
    """
    return _read(source, to_question, limit, QUESTION_COLUMNS, with_field=False)


def read_pairs(source: str | Path) -> Loaded[Pair]:
    """Read toxic texts with their neutral wordings, the first neutral one of each row.

    Rows with an empty side, with equal sides and repeated pairs are counted as skipped.

    Raises:
        DataError: as for `read_texts`.
    """
    return _read(source, to_pair, None, PAIR_COLUMNS, with_field=False)


def read_labelled(
    source: str | Path, *, field: str | None = None, threshold: float = 0.5
) -> Loaded[Labelled]:
    """Read texts that are toxic or not; whether both classes are there is for the user to check.

    Args:
        source: as for `read_texts`.
        field: the column of the text, its label beside it; None: known columns.
        threshold: ratings from it on, on a scale from 0 to 1, count as toxic.

    Raises:
        DataError: as for `read_texts`.
        RecipeError: ``threshold`` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise RecipeError(
            what="threshold is out of range",
            got=str(threshold),
            allowed="a number above 0, at most 1",
            fix="leave threshold out for its default, 0.5",
        )
    return _read_each(
        source, lambda row: to_labelled(row, field, threshold), None, LABELLED_COLUMNS
    )


def read_prompts(source: str | Path) -> Loaded[Text]:
    """Read texts to be continued; exact duplicates are dropped and counted as skipped.

    Raises:
        DataError: as for `read_texts`.
    """
    return _read(source, to_prompt, None, PROMPT_COLUMNS, with_field=False)


def _read(
    source: str | Path,
    make: Callable[[Row], T],
    limit: int | None,
    expected: str,
    *,
    with_field: bool,
) -> Loaded[T]:
    """Read a source of which each row is one item."""
    return _read_each(source, lambda row: [make(row)], limit, expected, with_field=with_field)


def _read_each(
    source: str | Path,
    make: Callable[[Row], Iterable[T | RowError]],
    limit: int | None,
    expected: str,
    *,
    with_field: bool = False,
) -> Loaded[T]:
    """Read a source of which a row may be several items, each good or not on its own."""
    if limit is not None:
        _at_least_one("limit", limit)
    name = str(source)
    rows, digest = _open(name)
    first_row_of: dict[T, int] = {}
    skipped: list[Skipped] = []
    malformed = 0
    sample: Row = {}
    for number, row in rows:
        if not isinstance(row, RowError):
            sample = sample or row
        for item in _items(row, make):
            error = item
            if not isinstance(item, RowError) and item in first_row_of:
                error = RowError(f"duplicate of row {first_row_of[item]}", malformed=False)
            if isinstance(error, RowError):
                malformed += error.malformed
                skipped.append(Skipped(number, error.reason))
            else:
                first_row_of[error] = number
        if len(first_row_of) == limit:
            break
    read = len(first_row_of) + len(skipped)
    if not first_row_of or 2 * malformed > read:
        _refuse(name, read, malformed, skipped, sample, expected, with_field)
    return Loaded(tuple(first_row_of), name, digest, tuple(skipped))


def _items(
    row: Row | RowError, make: Callable[[Row], Iterable[T | RowError]]
) -> Iterator[T | RowError]:
    """What one row holds: items, and the errors of those that cannot be used."""
    try:
        if isinstance(row, RowError):
            raise row
        yield from make(row)
    except RowError as error:
        yield error


def _open(name: str) -> tuple[Iterable[NumberedRow], str]:
    """The rows of a source and its hash."""
    path = local_path(name)
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(
            what=f"{name} is refused",
            got=f"the suffix {path.suffix}",
            allowed=", ".join(SUFFIXES),
            fix="save the data as .jsonl; such files can hold a pickle, and a pickle can run code",
        )
    try:
        if path.is_dir():
            return _hashed(tables.folder_rows(path))
        if not path.exists():
            if suffix not in SUFFIXES and _is_hub_name(name):
                return _hashed(tables.hub_rows(name))
            raise _no_such_file(name, path)
        if suffix not in SUFFIXES or not path.is_file():
            raise DataError(
                what=f"{name} is of no known format",
                got=f"the suffix {path.suffix!r}" if path.is_file() else "not a regular file",
                allowed=", ".join(SUFFIXES) + ", or a folder of them",
                fix="unpack or convert it, and give it the suffix of its format",
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            what=f"{name} cannot be read",
            got=f"{type(error).__name__}: {error.strerror or error}",
            allowed="a file or folder that the user running expunge may read",
            fix="check its permissions (ls -l), or copy it to a place of your own",
        ) from error
    digest = sha256(data).hexdigest()
    if suffix == ".parquet":
        return tables.parquet_rows([path]), digest
    return READERS[suffix](decode(data, name), name), digest


def _hashed(rows: Iterator[NumberedRow]) -> tuple[list[NumberedRow], str]:
    kept = list(rows)
    return kept, tables.canonical_sha256(kept)


def _is_hub_name(name: str) -> bool:
    # A local folder of the owner's name means that a path was mistyped: no network for that.
    return bool(tables.HUB_NAME.fullmatch(name)) and not Path(name).parent.exists()


def _no_such_file(name: str, path: Path) -> DataError:
    folder = path.parent
    beside = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    hint = f"did you mean {str(folder / close[0])!r}?" if close else "check the path"
    return DataError(
        what=f"No such file: {name}",
        got=repr(name) if folder.is_dir() else f"{name!r}, and there is no folder {folder}",
        allowed=f"a file in {', '.join(SUFFIXES)}, a folder, or owner/name on the hub",
        fix=hint,
    )


def _refuse(
    name: str,
    read: int,
    malformed: int,
    skipped: list[Skipped],
    sample: Row,
    expected: str,
    with_field: bool,
) -> NoReturn:
    found = columns(sample)
    if not read:
        what, got = f"{name} is empty", "no rows"
    else:
        unusable = len(skipped) == read
        what = f"{name} has no usable row" if unusable else f"Most rows of {name} are malformed"
        count = len(skipped) if unusable else malformed
        got = f"{count} of {read} rows: {_named(skipped)}; columns found: {', '.join(found) or '-'}"
    fix = "check that this is the right file, and that it is whole"
    if with_field and found:
        likely = max(found, key=lambda column: len(str(lookup(sample, column)).split()))
        fix = f"name the column that holds the text, as field={likely!r}, or check the file"
    raise DataError(what=what, got=got, allowed=f"columns {expected}", fix=fix)


def _named(skipped: Iterable[Skipped]) -> str:
    every = list(skipped)
    return ", ".join(map(str, every[:NAMED_ROWS])) + (", …" if len(every) > NAMED_ROWS else "")


def _at_least_one(setting: str, value: int) -> None:
    if value < 1:
        raise RecipeError(
            what=f"{setting} is out of range",
            got=str(value),
            allowed="a whole number from 1",
            fix=f"leave {setting} out for its default",
        )
