"""The runs of a page, grouped by what was done and on which function it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expunge.comparison import Cell, Comparison, Row
from expunge.records import RunRecord, Score
from expunge.report.plot import ORACLE_SERIES
from expunge.report.shown import finite

ROLES = ("base", "patched", "oracle")


@dataclass(frozen=True)
class Group:
    """One method on one function, its runs by seed.

    Attributes:
        series: its colour and shape, that of the method everywhere.
        slug: for anchors and file names.
    """

    method: str
    function: str
    series: int
    slug: str
    row: Row

    @property
    def name(self) -> str:
        """``cosine-rmu on knowledge``."""
        return f"{self.method} on {self.function}"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """By seed."""
        return tuple(sorted(self.row.cells, key=lambda cell: cell.place.seed))

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """Of the cells that have one, by seed."""
        return tuple(cell.record for cell in self.cells if cell.record is not None)


def groups_of(comparison: Comparison) -> tuple[Group, ...]:
    """All rows, those on interference last; each method has one series throughout."""
    rows = (*comparison.rows, *comparison.interference)
    done = [done_of(row) for row in rows]
    numbers = {name: at for at, name in enumerate(dict.fromkeys(done))}
    names = slugs(f"{name} {row.function}" for name, row in zip(done, rows, strict=True))
    return tuple(
        Group(
            name,
            row.function,
            numbers[name] + (numbers[name] >= ORACLE_SERIES),
            names[f"{name} {row.function}"],
            row,
        )
        for name, row in zip(done, rows, strict=True)
    )


def done_of(row: Row) -> str:
    """What was done: the method, and what it was for where something else was measured."""
    plain = row.removed == row.function or " + " in row.method
    return row.method if plain else f"{row.method}, for {row.removed}"


def slugs(names: Iterable[str]) -> dict[str, str]:
    """Names as parts of file names and of a page's own anchors, each its own."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        slug = slug_of(name)
        while slug in found.values():
            slug += "-2"
        found[name] = slug
    return found


def slug_of(name: str) -> str:
    """A name in small letters, digits and dashes."""
    kept = "".join(c if c.isascii() and c.isalnum() else " " for c in name.lower())
    return "-".join(kept.split())[:60] or "x"


@dataclass(frozen=True)
class Budget:
    """What a group spent; None where no record tells.

    Attributes:
        all_steps, all_looks: of all runs, and of the choice of settings before them.
        steps, looks, train, evaluate, memory: means over the runs, the choice left out.
    """

    group: Group
    all_steps: int | None
    all_looks: int | None
    steps: float | None
    looks: float | None
    train: float | None
    evaluate: float | None
    memory: float | None


def budget(group: Group) -> Budget:
    """Steps and looks, seconds, memory."""
    records = group.records
    return Budget(
        group,
        group.row.total("inner_steps"),
        group.row.total("looks"),
        _mean([finite(cell.spent.get("inner_steps")) for cell in group.cells]),
        _mean([finite(cell.spent.get("looks")) for cell in group.cells]),
        _mean([_seconds(record, without="evaluate") for record in records]),
        _mean([finite(record.timing.get("evaluate")) for record in records]),
        _mean([float(record.peak_memory_bytes) for record in records]),
    )


def _seconds(record: RunRecord, without: str) -> float | None:
    told = [finite(value) for name, value in record.timing.items() if name != without]
    return sum(value for value in told if value is not None) if told else None


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return sum(held) / len(held) if held else None


@dataclass(frozen=True)
class ScoreLine:
    """A score of the three models, in `ROLES`' order; None where it was not measured."""

    first: Score
    scores: tuple[Score | None, ...]


def score_lines(record: RunRecord) -> tuple[ScoreLine, ...]:
    """Every score of a run, models side by side."""
    found = []
    for key in dict.fromkeys(score.key for score in record.scores):
        own = {score.model: score for score in record.scores if score.key == key}
        scores = tuple(own.get(role) for role in ROLES)  # type: ignore[call-overload]
        found.append(ScoreLine(next(iter(own.values())), scores))
    return tuple(found)


@dataclass(frozen=True)
class Said:
    """One continuation.

    Attributes:
        who: ``base``, ``oracle``, or the method that changed the model.
        flagged: the scorers that call it toxic.
    """

    who: str
    text: str
    flagged: tuple[str, ...]


@dataclass(frozen=True)
class Prompted:
    """A prompt and what the models made of it."""

    prompts: str
    prompt: str
    said: tuple[Said, ...]


def samples(groups: Sequence[Group]) -> tuple[Prompted, ...]:
    """What base and oracle say, and each method's first run, to the same prompts."""
    found: dict[tuple[str, str], dict[str, Said]] = {}
    for group in groups:
        record = next((one for one in group.records if one.samples), None)
        for sample in record.samples if record is not None else ():
            own = found.setdefault((str(sample.prompts), str(sample.prompt)), {})
            for role in ("base", "oracle", "patched"):
                if role in sample.said:
                    who = group.method if role == "patched" else role
                    flags = tuple(map(str, sample.flagged.get(role) or ()))
                    own.setdefault(who, Said(who, str(sample.said[role]), flags))
    return tuple(Prompted(*key, tuple(said.values())) for key, said in found.items())
