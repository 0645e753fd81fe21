"""A comparison: run records in, the matrix with its tests and its verdict out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.comparison.cells import (
    DIVERGED,
    Cell,
    Place,
    cell_of,
    diverged_cell,
    is_choice,
    oracle_cell,
    place_of,
    recipe_of,
)
from expunge.comparison.grounds import notes_of
from expunge.comparison.matrix import Row, plain, rows_of
from expunge.comparison.testing import Test, tests_of
from expunge.comparison.together import interference_tests
from expunge.comparison.verdict import MARGIN, Verdict, verdict_of
from expunge.errors import DataError
from expunge.records import RunRecord

OWN = {"knowledge": "cosine-rmu", "toxicity": "multi-layer-probe"}


@dataclass(frozen=True)
class Settings:
    """What the tests and the verdict rest on.

    Attributes:
        own: function -> its own objective; the first two are those of the verdict.
        margin: of the harmonic mean, below which a difference counts as none.
    """

    own: Mapping[str, str]
    margin: float = MARGIN


@dataclass(frozen=True, eq=False)
class Comparison:
    """The matrix.

    Attributes:
        rows: a method on a function each.
        tests: each function's own objective against the other methods on it.
        verdict: None where the cells for it are not there; ``verdict_reason`` says which.
        interference: rows of sums of patches, and of patches for another function than the measured
            one; ``method`` says how they were made.
        interference_tests: these rows minus the function's own objective alone.
        oracles: of each function, the model that was never taught it, where one was measured.
        notes: what a reader must know.
    """

    rows: tuple[Row, ...]
    tests: tuple[Test, ...]
    verdict: Verdict | None
    verdict_reason: str | None
    interference: tuple[Row, ...]
    interference_tests: tuple[Test, ...]
    oracles: tuple[Cell, ...]
    notes: tuple[str, ...]
    settings: Settings

    @classmethod
    def of(
        cls,
        records: Iterable[RunRecord],
        *,
        own: Mapping[str, str] | None = None,
        expected: Sequence[Place] = (),
        diverged: Mapping[Place, str] | None = None,
        margin: float = MARGIN,
    ) -> Comparison:
        """Compute everything from finished runs.

        Args:
            records: those of one matrix, in any order; sums of patches among them, runs that
                diverged, and the searches behind the settings.
            own: function -> its own objective; default: OWN, and where it was only run with a
                learned trade-off or a schedule, that.
            expected: cells that there should be; those without a record are shown as missing.
            diverged: cells whose run led nowhere, and why.
            margin: difference of the harmonic mean that counts as none.

        Raises:
            DataError: nothing to compare; two records of one cell; a record without its recipe; a
                margin that is not above 0.
        """
        if not margin > 0:
            raise DataError(
                what="Differences within the margin count as none, so it must have a size",
                got=f"margin {margin}",
                allowed="above 0, such as .05 of the harmonic mean",
                fix="leave it out, or give a larger one",
            )
        given, given_up = list(records), dict(diverged or {})
        choices = [r for r in given if is_choice(r)]
        given = [r for r in given if not is_choice(r)]
        plain_ones = [r for r in given if r.function == recipe_of(r)["function"]]
        others = [r for r in given if r.function != recipe_of(r)["function"]]
        given_up |= {p: r.training[DIVERGED] for p, r in _placed(plain_ones) if _diverged(r)}
        plain_ones = [r for r in plain_ones if not _diverged(r)]
        # Training alone, as before a sequence, says nothing where the same cell has a result.
        filled = {place for place, r in _placed(plain_ones) if r.scores} | given_up.keys()
        plain_ones = [r for place, r in _placed(plain_ones) if r.scores or place not in filled]
        cells = [cell_of(record) for record in plain_ones]
        _check_once(cells)
        known = {cell.place for cell in cells}
        unfilled = {place: why for place, why in given_up.items() if place in known}
        cells += [diverged_cell(p, why) for p, why in given_up.items() if p not in known]
        known |= given_up.keys()
        cells += [
            Cell(place, "missing", reason="there is no record of it")
            for place in dict.fromkeys(expected)
            if place not in known
        ]
        if not cells and not others:
            raise DataError(
                what="There is nothing to compare",
                got="no run record",
                allowed="records of finished runs, one for each objective, function and seed",
                fix="name the folder that holds the runs",
            )
        added_up = [
            diverged_cell(place, r.training[DIVERGED], r.function) if _diverged(r) else cell_of(r)
            for place, r in _placed(others)
        ]
        rows, interference = rows_of(cells, choices), rows_of(added_up)
        settings = Settings(own=_own(rows, own), margin=margin)
        tests = tests_of(rows, settings.own)
        together = interference_tests(rows, interference, settings.own)
        verdict, reason = verdict_of(tests, settings.own, margin)
        return cls(
            rows=rows,
            tests=tests,
            verdict=verdict,
            verdict_reason=reason,
            interference=interference,
            interference_tests=together,
            oracles=_oracles(given),
            notes=tuple(notes_of([*rows, *interference], unfilled)),
            settings=settings,
        )

    def row(self, method: str, function: str) -> Row | None:
        """That row of the matrix, or None."""
        for row in self.rows:
            if (row.method, row.function) == (method, function):
                return row
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "cells": [row.to_dict() for row in self.rows],
            "tests": plain(self.tests),
            "verdict": plain(self.verdict),
            "verdict_reason": self.verdict_reason,
            "interference": [row.to_dict() for row in self.interference],
            "interference_tests": plain(self.interference_tests),
            "oracles": [cell.to_dict() for cell in self.oracles],
            "notes": list(self.notes),
            "settings": plain(self.settings),
        }


def _placed(records: Sequence[RunRecord]) -> list[tuple[Place, RunRecord]]:
    return [(place_of(record), record) for record in records]


def _diverged(record: RunRecord) -> bool:
    return DIVERGED in record.training


def _own(rows: Sequence[Row], own: Mapping[str, str] | None) -> dict[str, str]:
    """The own objectives as the rows call them."""
    if own is not None:
        return dict(own)
    methods = {row.method for row in rows}
    for ending in ("", " (learned)", " (schedule)"):
        named = {function: name + ending for function, name in OWN.items()}
        if methods & set(named.values()):
            return named
    return dict(OWN)


def _oracles(records: Sequence[RunRecord]) -> tuple[Cell, ...]:
    """Of each function, from the first record that measured one."""
    found: dict[str, Cell] = {}
    for record in records:
        cell = oracle_cell(record)
        if cell.status == "measured":
            found.setdefault(cell.place.function, cell)
    return tuple(found.values())


def _check_once(cells: Sequence[Cell]) -> None:
    seen: set[Place] = set()
    for cell in cells:
        if cell.place in seen:
            raise DataError(
                what="Two records fill one cell of the comparison",
                got=str(cell.place),
                allowed="one record for each objective, function and seed",
                fix="compare a folder that holds one of them; runs on validation are no results",
            )
        seen.add(cell.place)
