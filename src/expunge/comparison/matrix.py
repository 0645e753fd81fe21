"""Rows of the matrix: one method on one function, over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from functools import cached_property
from typing import Any

from expunge.comparison.cells import Cell, Status, place_of, spent
from expunge.evaluation.stats import Spread, mean_and_spread
from expunge.records import RunRecord

SUMMARIES = ("forget", "retain", "harmonic", "hypervolume")


@dataclass(frozen=True, eq=False)
class Row:
    """One method on one function.

    Attributes:
        function: that was measured.
        removed: that was to be removed; another one, or several, where patches were added up or
            measured for their side effects.
        cells: by seed.
        choice: what the choice of settings took for all seeds together, as a cell's ``spent``.
    """

    method: str
    function: str
    cells: tuple[Cell, ...]
    removed: str
    choice: Mapping[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[Cell, ...]:
        """Cells with a result; a run that diverged has one: 0."""
        return tuple(cell for cell in self.cells if cell.status != "missing")

    def count(self, status: Status) -> int:
        """Seeds of that status."""
        return sum(cell.status == status for cell in self.cells)

    @property
    def diverged(self) -> int:
        """Seeds whose run diverged."""
        return self.count("diverged")

    @property
    def missing(self) -> int:
        """Seeds without a result."""
        return self.count("missing")

    @cached_property
    def spreads(self) -> dict[str, Spread]:
        """Mean and spread over seeds of forget, retain, harmonic and hypervolume."""
        return {
            name: self._spread(getattr(cell, name) for cell in self.counted) for name in SUMMARIES
        }

    @cached_property
    def parts(self) -> dict[str, Spread]:
        """The same of each part, over the seeds that were measured."""
        names = {name: None for cell in self.cells for name in cell.parts}
        return {name: self._spread(cell.parts.get(name) for cell in self.cells) for name in names}

    @property
    def forget(self) -> Spread:
        """Over seeds."""
        return self.spreads["forget"]

    @property
    def retain(self) -> Spread:
        """Over seeds."""
        return self.spreads["retain"]

    @property
    def harmonic(self) -> Spread:
        """Over seeds."""
        return self.spreads["harmonic"]

    @property
    def hypervolume(self) -> Spread:
        """Over seeds; of each point alone."""
        return self.spreads["hypervolume"]

    def spent(self, name: str) -> Spread:
        """Inner steps or looks of a seed, as far as they are recorded."""
        return self._spread(cell.spent.get(name) for cell in self.cells)

    def total(self, name: str) -> int | None:
        """Inner steps or looks of all seeds and of the choice of settings before them.

        Seeds whose run did not record it, as one that diverged, count as the mean of the others;
        None where no seed did.
        """
        mean = self.spent(name).mean
        if mean is None:
            return None
        return round(mean * len(self.counted)) + self.choice.get(name, 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "method": self.method,
            "function": self.function,
            "removed": self.removed,
            "seeds": [cell.place.seed for cell in self.cells],
            "diverged": self.diverged,
            "missing": self.missing,
            **{name: plain(spread) for name, spread in self.spreads.items()},
            "parts": {name: plain(spread) for name, spread in self.parts.items()},
            "spent": {name: plain(self.spent(name)) for name in ("inner_steps", "looks")},
            "choice": dict(self.choice),
            "total": {name: self.total(name) for name in ("inner_steps", "looks")},
            "by_seed": [cell.to_dict() for cell in self.cells],
        }

    @staticmethod
    def _spread(values: Iterable[float | None]) -> Spread:
        return mean_and_spread([value for value in values if value is not None])


def rows_of(cells: Sequence[Cell], choices: Sequence[RunRecord] = ()) -> tuple[Row, ...]:
    """Cells by function and method, in the order in which these first appear; seeds ascend.

    Args:
        choices: records of the searches behind the settings.
    """
    chosen = {(place_of(r).function, place_of(r).method): spent(r) for r in choices}
    grouped: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        told = cell.removed if cell.record is None else cell.record.function
        removed = told or cell.place.function
        grouped.setdefault((cell.place.function, cell.place.method, removed), []).append(cell)
    functions = list(dict.fromkeys(function for function, _, _ in grouped))
    ordered = sorted(grouped.items(), key=lambda item: functions.index(item[0][0]))
    return tuple(
        Row(
            method,
            function,
            tuple(sorted(own, key=lambda cell: cell.place.seed)),
            removed,
            chosen.get((function, method), {}),
        )
        for (function, method, removed), own in ordered
    )


def plain(value: Any) -> Any:
    """Frozen value objects as JSON-able dictionaries."""
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: plain(getattr(value, one.name)) for one in fields_of(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
