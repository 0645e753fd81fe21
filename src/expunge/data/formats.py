"""Text formats → numbered rows: txt, jsonl, json, csv, tsv. Nothing here runs code or unpickles.

A row is numbered as an editor or a spreadsheet numbers it: by line in txt and jsonl (a paragraph
by its first line), by record in csv and tsv (the header is row 1), by position in a json list.
Byte order marks are dropped and every line end becomes ``\\n``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from expunge.data.rows import Row, RowError
from expunge.errors import DataError

NumberedRow = tuple[int, Row | RowError]
MMLU_HEADER = ["question", "A", "B", "C", "D", "answer"]
LARGEST_CELL = 2**31 - 1  # csv refuses cells over 128 KiB unless told otherwise


def decode(data: bytes, source: str) -> str:
    """UTF-8 bytes to text with ``\\n`` line ends. Raises DataError where they are not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            what=f"{source} is not UTF-8 text",
            got=f"byte 0x{data[error.start]:02x} at byte offset {error.start}",
            allowed="UTF-8, with or without a byte order mark",
            fix="save as UTF-8 (iconv -f LATIN1 -t UTF-8, or the encoding box of the editor)",
        ) from error
    if "\0" in text:
        raise DataError(
            what=f"{source} is not a text file",
            got=f"a zero byte at byte offset {data.index(0)}",
            allowed="UTF-8 text without zero bytes",
            fix="give the text file itself; if it is UTF-16, save as UTF-8",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


END_OF_TEXT = "<|endoftext|>"


def txt_rows(text: str, source: str) -> Iterator[NumberedRow]:
    """Paragraphs between blank lines; one document a line where no blank line lies between.

    A line that holds the end-of-text mark alone separates documents as a blank line does.
    """
    lines = ["" if line.strip() == END_OF_TEXT else line for line in text.split("\n")]
    full = [number for number, line in enumerate(lines, 1) if line.strip()]
    paragraphs = bool(full) and full[-1] - full[0] + 1 > len(full)
    start = 0
    for position, number in enumerate(full):
        last_line = position + 1 == len(full) or full[position + 1] > number + 1
        if not paragraphs or last_line:
            yield full[start], {"text": "\n".join(lines[full[start] - 1 : number])}
            start = position + 1


def jsonl_rows(text: str, source: str) -> Iterator[NumberedRow]:
    """One JSON object a line; blank lines are ignored."""
    # str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, _json_row(json.loads(line))
            except (ValueError, RecursionError):
                yield number, RowError("not JSON")


def json_rows(text: str, source: str) -> Iterator[NumberedRow]:
    """A JSON list of objects. Raises DataError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_list(source, f"text that is not JSON: {error}") from error
    if not isinstance(value, list):
        raise _not_a_list(source, "one JSON value that is not a list")
    for number, one in enumerate(value, 1):
        yield number, _json_row(one)


def csv_rows(text: str, source: str) -> Iterator[NumberedRow]:
    """Comma-separated records under a header; cells may hold line breaks inside quotes."""
    return _table(_csv_records(text, source), source)


def tsv_rows(text: str, source: str) -> Iterator[NumberedRow]:
    """Tab-separated lines under a header.

    A line is a row whatever its quotes say: published tsv files hold unpaired quotes, and a csv
    reader would join hundreds of rows at one of them. A cell wholly in quotes loses them.
    """
    records = ([_unquote(cell) for cell in line.split("\t")] for line in text.split("\n"))
    return _table(records, source)


READERS: dict[str, Callable[[str, str], Iterator[NumberedRow]]] = {
    ".txt": txt_rows,
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}


def _json_row(value: Any) -> Row | RowError:
    if isinstance(value, str):
        return {"text": value}
    return value if isinstance(value, dict) else RowError("not a JSON object")


def _not_a_list(source: str, got: str) -> DataError:
    return DataError(
        what=f"{source} cannot be read as JSON rows",
        got=got,
        allowed="a list of objects, such as [{…}, {…}]",
        fix="save one object a line under the suffix .jsonl, or wrap the objects in a list",
    )


def _csv_records(text: str, source: str) -> Iterator[list[str] | RowError]:
    lines = [line + "\n" for line in text.split("\n")]
    with _large_cells():
        reader = csv.reader(lines)
        first = 0
        for record in reader:
            last = reader.line_num
            # A lost quote makes one record of many lines, sometimes with the right column count.
            joined = last - first > 1 and not _pairs_its_quotes(lines[first:last])
            reason = f"a quote is not closed: it joins lines {first + 1} to {last}"
            yield RowError(reason) if joined else record
            first = last


def _pairs_its_quotes(lines: list[str]) -> bool:
    try:
        return len(list(csv.reader(lines, strict=True))) == 1
    except csv.Error:
        return False


@contextmanager
def _large_cells() -> Iterator[None]:
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _table(records: Iterator[list[str] | RowError], source: str) -> Iterator[NumberedRow]:
    header: list[str] | None = None
    for number, record in enumerate(records, 1):
        if isinstance(record, RowError):
            yield number, record
            continue
        if not any(cell.strip() for cell in record):
            continue
        if header is None:
            header = _header(record, source)
            if header is not MMLU_HEADER:
                continue
        if len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))
        else:
            yield number, RowError(f"{len(record)} columns where the header has {len(header)}")


def _header(record: list[str], source: str) -> list[str]:
    """The column names: the first record, or MMLU's where that is a question already."""
    if len(record) == len(MMLU_HEADER) and record[-1].strip() in set("0123ABCD"):
        return MMLU_HEADER
    names = [cell.strip() for cell in record]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            what=f"{source} has two columns of one name",
            got=", ".join(map(repr, twice)),
            allowed="a first row with a different name for each column",
            fix="rename one, or add the header row if the first row is data",
        )
    return names
