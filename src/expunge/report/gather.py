"""Which records a page is made of, and what a comparison that they are of had planned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expunge.compare import COMPARISON_NAME
from expunge.comparison import Comparison, Place
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
class Planned:
    """What a ``comparison.json`` says that was compared.

    Attributes:
        own: function -> its own objective.
        cells: those that there should be.
    """

    own: Mapping[str, str]
    cells: tuple[Place, ...]

    @classmethod
    def load(cls, path: Path) -> Planned:
        """Read one. Raises DataError if it is none."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            own = {str(function): str(name) for function, name in raw["settings"]["own"].items()}
            cells = tuple(
                Place(str(row["method"]), str(row["function"]), int(seed))
                for row in raw["cells"]
                for seed in row["seeds"]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                what=f"No readable comparison at {path}",
                got=f"{type(error).__name__}: {error}",
                allowed=f"{COMPARISON_NAME} as `expunge compare` leaves it",
                fix="run the same `expunge compare` again: it writes the file anew",
            ) from error
        return cls(own, cells)


@dataclass(frozen=True)
class Gathered:
    """All records below some paths.

    Attributes:
        left_out: (name, why) of each record or comparison that could not be read.
        planned: of the comparisons that lie there.
    """

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    planned: tuple[Planned, ...] = ()

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """The records alone."""
        return tuple(source.record for source in self.sources)

    def compared(self) -> Comparison:
        """The records as `expunge compare` would: with its own objectives, and its cells expected.

        Several comparisons that name unlike own objectives leave the usual ones; of a single run
        nothing else is expected.
        """
        first = self.planned[0].own if self.planned else None
        alike = all(one.own == first for one in self.planned)
        cells = () if len(self.sources) == 1 else (c for one in self.planned for c in one.cells)
        return Comparison.of(self.records, own=first if alike else None, expected=tuple(cells))


def gather(paths: Sequence[Path]) -> Gathered:
    """Read the records of runs, and of all runs below folders; each once.

    Raises:
        DataError: a path is missing, or no record can be read.
    """
    sources: dict[Path, Source] = {}
    left_out: dict[str, str] = {}
    planned: dict[Path, Planned] = {}
    for path in paths:
        folder = path.parent if path.name == RECORD_NAME and path.is_file() else path
        bad: list[DataError] = []
        for run, record in find_records(folder, bad.append):
            if "recipes" in record.provenance and not record.scores:
                # Trained jointly or in sequence; what it does to a function is another record.
                continue
            try:
                recipe_of(record)
            except DataError as error:
                left_out[_name(run, folder)] = error.got
                continue
            digest = sha256((run / RECORD_NAME).read_bytes()).hexdigest()
            sources.setdefault(run.resolve(), Source(_name(run, folder), record, digest))
        for place in sorted(folder.rglob(COMPARISON_NAME)):
            try:
                planned[place.resolve()] = Planned.load(place)
            except DataError as error:
                bad.append(error)
        for one in bad:
            left_out[_shortened(one.what, folder)] = _shortened(one.got, folder)
    if not sources:
        raise DataError(
            what="There is no run to report on",
            got=f"{', '.join(map(str, paths))}: no readable {RECORD_NAME} of a single recipe"
            + (f", {len(left_out)} unreadable" if left_out else ""),
            allowed="folders of finished runs, or a folder below which they lie",
            fix="give the folder that `expunge run -o` or `expunge demo -o` wrote to",
        )
    return Gathered(tuple(sources.values()), tuple(left_out.items()), tuple(planned.values()))


def _name(run: Path, folder: Path) -> str:
    inside = run.relative_to(folder)
    return str(inside) if inside.parts else run.resolve().name


def _shortened(text: str, folder: Path) -> str:
    """Pages are given away: where the folder lay on a machine is nobody's business."""
    return text.replace(f"{folder}/", "").replace(str(folder), folder.resolve().name)
