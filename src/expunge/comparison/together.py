"""Several functions removed from one model, against the part that was made for one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expunge.comparison.matrix import Row
from expunge.comparison.testing import Test, difference
from expunge.evaluation.paired import holm


def interference_tests(
    rows: Sequence[Row], combined: Sequence[Row], own: Mapping[str, str]
) -> tuple[Test, ...]:
    """Each combination minus the function's own objective alone, paired by seed and example.

    Adjusted by Holm among themselves: they answer another question than the matrix.

    Args:
        rows: of the matrix.
        combined: rows of sums, joint training and sequences, measured on one function each.
        own: function -> the objective made for it.
    """
    parts = {(row.function, row.method): row for row in rows}
    tests = []
    for row in combined:
        alone = parts.get((row.function, own.get(row.function, "")))
        among = row.removed.split(" + ")
        if alone is None or len(among) < 2 or row.function not in among:
            continue
        sides = {name: difference(row, alone, name) for name in ("forget", "retain")}
        tests.append(
            Test(row.function, row.method, alone.method, difference(row, alone), parts=sides)
        )
    adjusted = holm([test.effect.p for test in tests])
    return tuple(replace(test, p_adjusted=p) for test, p in zip(tests, adjusted, strict=True))
