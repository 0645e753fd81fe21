"""Tables in the ways of Hugging Face `datasets`: saved folders, parquet, shards, the hub.

Only format readers run, never a script from a data set's own repository.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from expunge.data.formats import READERS, NumberedRow, decode
from expunge.data.rows import Row, RowError
from expunge.errors import DataError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SAVED_FILES = ("state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` leaves
DEFAULT_SPLIT = "train"


def parquet_rows(files: list[Path]) -> Iterator[NumberedRow]:
    """Rows of parquet files, one file after the other, numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        # A type that Arrow cannot read is neither of the two.
        except (OSError, ValueError, pyarrow.ArrowNotImplementedError) as error:
            raise DataError(
                what=f"{file} cannot be read as parquet",
                got=_first_line(error),
                allowed="a whole parquet file",
                fix="download or write the file again",
            ) from error


def folder_rows(folder: Path) -> Iterator[NumberedRow]:
    """Rows of a folder: one that `datasets` saved, or one data file, or the shards of one."""
    if any((folder / name).is_file() for name in SAVED_FILES):
        return _saved_rows(folder)
    # Documentation and metadata lie beside data as txt and json; alone, these are the data.
    for suffixes in ({".parquet", ".jsonl", ".csv", ".tsv"}, {".json"}, {".txt"}):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
        if files:
            break
    else:
        raise DataError(
            what=f"No data in the folder {folder}",
            got=_names([file.name for file in folder.iterdir()]) or "an empty folder",
            allowed=f"a folder saved by datasets, or files in {', '.join(('.parquet', *READERS))}",
            fix="name the data file, or the subfolder that holds it",
        )
    # Two files are two data sets (forget and retain, train and test) unless numbered as shards.
    if len({(SHARD.sub("", file.stem), file.suffix) for file in files}) > 1:
        raise DataError(
            what=f"The folder {folder} holds several data sets",
            got=_names([file.name for file in files]),
            allowed="one file, or the shards NAME-00000-of-0000N of one data set",
            fix=f"name one of them, such as {files[0]}",
        )
    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(files)
    rows = (
        row
        for file in files
        for _, row in READERS[suffix](decode(file.read_bytes(), str(file)), str(file))
    )
    return enumerate(rows, 1)


def hub_rows(name: str) -> Iterator[NumberedRow]:
    """Rows of ``owner/name[:config][:split]`` on the Hugging Face hub. Uses the network."""
    import datasets

    path, config, split = [*name.split(":"), "", ""][:3]
    try:
        table = datasets.load_dataset(path, config or None, split=split or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            what=f"{name} cannot be loaded from the Hugging Face hub",
            got=f"{type(error).__name__}: {_first_line(error)}",
            allowed="owner/name[:config][:split], a network, and access to the data set",
            fix="check the name and its configs on the hub and log in if it is gated; "
            "a local file is named with its suffix, such as forget.jsonl",
        ) from error
    return enumerate(_one_split(table, name), 1)


def canonical_sha256(rows: Iterable[NumberedRow]) -> str:
    """SHA-256 over the rows as sorted JSON lines: the same content gives the same hash."""
    digest = hashlib.sha256()
    for _, row in rows:
        value = row.reason if isinstance(row, RowError) else row
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _saved_rows(folder: Path) -> Iterator[NumberedRow]:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder), keep_in_memory=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            what=f"{folder} cannot be read as a folder saved by datasets",
            got=f"{type(error).__name__}: {_first_line(error)}",
            allowed="a whole folder as Dataset.save_to_disk leaves it",
            fix="save it again, or name a .jsonl or .parquet file",
        ) from error
    return enumerate(_one_split(table, str(folder)), 1)


def _one_split(table: Any, name: str) -> Iterable[Row]:
    """The rows themselves, or those of the only split, or of ``train``."""
    import datasets

    rows: Iterable[Row] = table
    if isinstance(table, datasets.DatasetDict):
        split = next(iter(table)) if len(table) == 1 else DEFAULT_SPLIT
        if split not in table:
            raise DataError(
                what=f"{name} has several splits",
                got=", ".join(table),
                allowed=f"one split, or one of the name {DEFAULT_SPLIT}",
                fix=f"name it: owner/name:config:{next(iter(table))}, or the split's own folder",
            )
        rows = table[split]
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _names(names: list[str], most: int = 8) -> str:
    return ", ".join(sorted(names)[:most]) + (", …" if len(names) > most else "")
