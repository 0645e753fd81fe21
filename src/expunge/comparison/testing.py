"""Tests between methods on one function: the same seeds, the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.comparison.cells import Cell, Summary
from expunge.comparison.grounds import differing, grounds_of
from expunge.comparison.matrix import Row
from expunge.evaluation.paired import McNemar, holm, mcnemar, paired_bootstrap
from expunge.evaluation.significance import Effect, effect
from expunge.evaluation.stats import Interval

ALPHA = 0.05


@dataclass(frozen=True)
class Test:
    """A function's own objective against another method on it.

    Attributes:
        effect: own − other, of the harmonic mean of forgetting and retaining.
        p_adjusted: by Holm over all tests of the comparison; None where the effect has no p.
        parts: the same difference of ``forget`` and ``retain``; their p are not adjusted.
        mcnemar: by seed, of questions on what was to be forgotten; a: own. One pair of runs each.
        accuracy: of the same questions and pairs of runs, the 95 % interval of own − other over
            questions (`paired_bootstrap`).
    """

    __test__ = False  # no test of pytest's

    function: str
    own: str
    other: str
    effect: Effect
    p_adjusted: float | None = None
    parts: Mapping[str, Effect] = field(default_factory=dict)
    mcnemar: Mapping[int, McNemar] = field(default_factory=dict)
    accuracy: Mapping[int, Interval] = field(default_factory=dict)

    @property
    def better(self) -> bool:
        """Whether own is significantly better."""
        return self._significant and (self.effect.mean or 0) > 0

    @property
    def worse(self) -> bool:
        """Whether own is significantly worse."""
        return self._significant and (self.effect.mean or 0) < 0

    @property
    def _significant(self) -> bool:
        return self.p_adjusted is not None and self.p_adjusted < ALPHA


def difference(own: Row, other: Row, name: Summary = "harmonic") -> Effect:
    """Own − other over the seeds that both have, or a reason why there is no such number."""
    firsts, seconds = (
        {cell.place.seed: cell for cell in row.counted if cell.summary(name) is not None}
        for row in (own, other)
    )
    seeds = sorted(firsts.keys() & seconds.keys())
    pairs = [(firsts[seed], seconds[seed]) for seed in seeds]
    if not pairs:
        return Effect(reason="no seed was run with both")
    unlike = grounds_of(cell for pair in pairs for cell in pair)
    if len(unlike) > 1:
        keys = sorted({key for one in unlike[1:] for key in differing(unlike[0], one)})
        return Effect(reason=f"refused: they were not measured alike ({', '.join(keys)})")
    if not _one_base(cell for pair in pairs for cell in pair):
        return Effect(reason="refused: they changed other base models")
    differences = [_number(first, name) - _number(second, name) for first, second in pairs]
    if all(cell.status == "diverged" for pair in pairs for cell in pair):
        return Effect(mean=0.0, n_seeds=len(pairs), reason="both diverged with every seed")
    influences = _influences(pairs, name)
    if isinstance(influences, str):
        return Effect(reason=influences)
    return effect(differences, influences)


def tests_of(rows: Sequence[Row], own: Mapping[str, str]) -> tuple[Test, ...]:
    """Each function's own objective against each other method on it, adjusted together."""
    tests = []
    for function, method in own.items():
        here = [row for row in rows if row.function == function]
        ours = next((row for row in here if row.method == method), None)
        if ours is not None:
            tests += [_test(ours, row) for row in here if row is not ours]
    adjusted = holm([test.effect.p for test in tests])
    return tuple(replace(test, p_adjusted=p) for test, p in zip(tests, adjusted, strict=True))


def _test(own: Row, other: Row) -> Test:
    parts = {name: difference(own, other, name) for name in ("forget", "retain")}
    answers = {} if parts["forget"].mean is None else _answers_of_both(own, other)
    return Test(
        function=own.function,
        own=own.method,
        other=other.method,
        effect=difference(own, other),
        parts=parts,
        mcnemar={seed: mcnemar(*pair) for seed, pair in answers.items()},
        accuracy={
            seed: paired_bootstrap(*pair) for seed, pair in answers.items() if len(pair[0]) > 1
        },
    )


def _answers_of_both(own: Row, other: Row) -> dict[int, tuple[list[float], list[float]]]:
    """By seed, what both answered, of the questions on which both were scored."""
    first, second = (
        {cell.place.seed: _answers(cell) for cell in row.counted} for row in (own, other)
    )
    found = {}
    for seed in first.keys() & second.keys():
        if len(first[seed]) == len(second[seed]):
            pairs = zip(first[seed], second[seed], strict=True)
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            if both:
                found[seed] = ([a for a, _ in both], [b for _, b in both])
    return dict(sorted(found.items()))


def _answers(cell: Cell) -> list[float | None]:
    """Right or wrong on each question about what was to be forgotten; empty without questions."""
    values = [] if cell.record is None else cell.record.values
    kept = (v.values for v in values if (v.name, v.model) == ("forget_accuracy", "patched"))
    return next(kept, [])


def _influences(
    pairs: Sequence[tuple[Cell, Cell]], name: Summary
) -> dict[str, NDArray[np.float64]] | str | None:
    """Set of examples -> (S, Q), first − second; None: not known; a word: why they do not fit."""
    cells = [cell for pair in pairs for cell in pair]
    if any(cell.status == "measured" and not cell.by_example for cell in cells):
        return None
    sizes: dict[str, int] = {}
    for cell in cells:
        for key, one in cell.by_example.get(name, {}).items():
            if sizes.setdefault(key, len(one)) != len(one):
                return f"refused: {key} has {sizes[key]} examples in one run, {len(one)} in another"
    none: Mapping[str, Any] = {}
    return {
        key: np.array(
            [
                first.by_example.get(name, none).get(key, np.zeros(size))
                - second.by_example.get(name, none).get(key, np.zeros(size))
                for first, second in pairs
            ]
        )
        for key, size in sizes.items()
    }


def _number(cell: Cell, name: Summary) -> float:
    value = cell.summary(name)
    assert value is not None
    return value


def _one_base(cells: Iterable[Cell]) -> bool:
    """Whether tensors that several runs changed were the same before, going by their hashes."""
    seen: dict[str, Any] = {}
    for cell in cells:
        tensors = {} if cell.record is None else cell.record.provenance.get("base") or {}
        for name, tensor in tensors.items():
            if seen.setdefault(name, tensor["fingerprint"]) != tensor["fingerprint"]:
                return False
    return True
