"""Which records a page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expunge.comparison.cells import recipe_of
from expunge.errors import DataError
from expunge.records import RECORD_NAME, RunRecord, find_records


@dataclass(frozen=True)
class Source:
    """A record and where it lay.

    Attributes:
        name: of the run's folder, below the path that was given.
        digest: SHA-256 of the record's file.
    """

    name: str
    record: RunRecord
    digest: str


@dataclass(frozen=True)
class Gathered:
    """All records below some paths.

    Attributes:
        left_out: (name, why) of each record that could not be read.
    """

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """The records alone."""
        return tuple(source.record for source in self.sources)


def gather(paths: Sequence[Path]) -> Gathered:
    """Read the records of runs, and of all runs below folders; each once.

    Raises:
        DataError: a path is missing, or no record can be read.
    """
    sources: dict[Path, Source] = {}
    left_out: dict[str, str] = {}
    for path in paths:
        folder = path.parent if path.name == RECORD_NAME and path.is_file() else path
        bad: list[DataError] = []
        for run, record in find_records(folder, bad.append):
            try:
                recipe_of(record)
            except DataError as error:
                left_out[_name(run, folder)] = error.got
                continue
            digest = sha256((run / RECORD_NAME).read_bytes()).hexdigest()
            sources.setdefault(run.resolve(), Source(_name(run, folder), record, digest))
        for one in bad:
            left_out[_shortened(one.what, folder)] = _shortened(one.got, folder)
    if not sources:
        raise DataError(
            what="There is no run to report on",
            got=f"{', '.join(map(str, paths))}: no readable {RECORD_NAME}"
            + (f", {len(left_out)} unreadable" if left_out else ""),
            allowed="folders of finished runs, or a folder below which they lie",
            fix="give the folder that `expunge run -o` or `expunge demo -o` wrote to",
        )
    return Gathered(tuple(sources.values()), tuple(left_out.items()))


def _name(run: Path, folder: Path) -> str:
    inside = run.relative_to(folder)
    return str(inside) if inside.parts else run.resolve().name


def _shortened(text: str, folder: Path) -> str:
    """Pages are given away: where the folder lay on a machine is nobody's business."""
    return text.replace(f"{folder}/", "").replace(str(folder), folder.resolve().name)
