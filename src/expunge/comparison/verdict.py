"""Tests between methods on one function, and what they say of the claim to be settled.

The claim: each function needs an objective of its own. Two tests settle it: each
function's own objective against the other function's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expunge.comparison.cells import Cell, Summary
from expunge.comparison.grounds import differing, grounds_of
from expunge.comparison.matrix import Row
from expunge.evaluation.paired import McNemar, holm, mcnemar
from expunge.evaluation.significance import Effect, effect, equivalence, needed

Word = Literal["specialised", "interchangeable", "one objective for both", "undecided"]
ALPHA = 0.05
LEAST_P = 0.001
MARGIN = 0.05
POWER = 0.8
MEASURE = " of the harmonic mean of forgetting and retaining"


@dataclass(frozen=True)
class Test:
    """A function's own objective against another method on it.

    Attributes:
        effect: own − other, of the harmonic mean of forgetting and retaining.
        p_adjusted: by Holm over all tests of the comparison; None where the effect has no p.
        parts: the same difference of ``forget`` and ``retain``; their p are not adjusted.
        mcnemar: by seed, of questions on what was to be forgotten; a: own. One pair of runs each.
    """

    __test__ = False  # no test of pytest's

    function: str
    own: str
    other: str
    effect: Effect
    p_adjusted: float | None = None
    parts: Mapping[str, Effect] = field(default_factory=dict)
    mcnemar: Mapping[int, McNemar] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Verdict:
    """What the matrix says of the claim.

    Attributes:
        word: ``specialised``: each own objective is significantly better on its function than the
            other function's own. ``interchangeable``: both differences lie within the margin, by
            two one-sided tests, which counts first: such a difference may be significant too, but
            is too small to need an objective of its own. ``one objective for both``: one of the two
            is significantly better on both functions. ``undecided``: none of these.
        primary: the two tests it rests on.
        power: what would decide it.
    """

    word: Word
    sentence: str
    primary: tuple[Test, Test]
    power: str


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


def verdict_of(
    tests: Sequence[Test], own: Mapping[str, str], margin: float = MARGIN
) -> tuple[Verdict | None, str | None]:
    """The verdict, or None and why there is none."""
    if len(own) < 2:
        return None, "it takes two functions with an objective of their own"
    (one, first), (other, second) = list(own.items())[:2]
    if first == second:
        return None, f"{first} is named as the own objective of both functions"
    primary = []
    for function, ours, theirs in ((one, first, second), (other, second, first)):
        found = next(
            (t for t in tests if (t.function, t.own, t.other) == (function, ours, theirs)), None
        )
        if found is None:
            return None, f"{ours} and {theirs} were not both run on {function}"
        if found.effect.mean is None:
            return None, f"{ours} and {theirs} on {function}: {found.effect.reason}"
        primary.append(found)
    a, b = primary
    made = sum(test.effect.p is not None for test in tests)
    word = _word(a, b, margin)
    after = f" after Holm over {made} tests" if made > 1 else ""
    told = f"{_told(a, margin, MEASURE, after)}; {_told(b, margin)}"
    return Verdict(
        word, f"{word.capitalize()}: {told}.", (a, b), _power((a, b), made, margin)
    ), None


def _word(a: Test, b: Test, margin: float) -> Word:
    same = [equivalence(test.effect, margin) for test in (a, b)]
    if all(p is not None and p < ALPHA for p in same):
        return "interchangeable"
    if a.better and b.better:
        return "specialised"
    if (a.better and b.worse) or (a.worse and b.better):
        return "one objective for both"
    return "undecided"


def _told(test: Test, margin: float, of_what: str = "", after: str = "") -> str:
    """One test in words, with its numbers; the first also says what they are numbers of."""
    found = test.effect
    assert found.mean is not None
    lead = f"on {test.function} {test.own} "
    if found.p is None or test.p_adjusted is None:
        partial = ""
        if found.partial is not None:
            low, high = found.partial.ci_low, found.partial.ci_high
            kept = "seed" if found.partial.over == "examples" else "examples"
            partial = f" [{_num(low)}, {_num(high)}] over {found.partial.over} of this {kept} alone"
            partial = partial.replace("this examples", "these examples")
        return (
            f"{lead}differs from {test.other} by {_num(found.mean)}{partial}{of_what}, "
            f"untested ({found.reason})"
        )
    size = f"{_num(abs(found.mean))} {_interval(found)}{of_what}"
    if test.better:
        verb = f"beats {test.other} by {size}"
    elif test.worse:
        verb = f"loses to {test.other} by {size}"
    else:
        more = "above" if found.mean >= 0 else "below"
        verb = f"is {size} {more} {test.other}, which chance could explain"
    same = equivalence(found, margin)
    within = ""
    if same is not None and same < ALPHA:
        within = f"; smaller than {_num(margin)}, {_p(same)}"
    return f"{lead}{verb} ({_p(test.p_adjusted)}{after}{within})"


def _interval(found: Effect) -> str:
    """The interval, turned round where the effect is negative: the sentence tells its size."""
    assert found.mean is not None and found.ci_low is not None and found.ci_high is not None
    low, high = (
        (found.ci_low, found.ci_high) if found.mean >= 0 else (-found.ci_high, -found.ci_low)
    )
    return f"[{_num(low)}, {_num(high)}]"


def _power(primary: Sequence[Test], made: int, margin: float) -> str:
    """What it would take to decide the tests that are not significant."""
    open_tests = [test for test in primary if not (test.better or test.worse)]
    if not open_tests:
        return "Both tests are decided at this size."
    told = []
    for test in open_tests:
        lead = f"On {test.function}, {test.own} against {test.other}: "
        # The smallest p of a family must pass this; later ones have it easier.
        effect_ = test.effect
        ways = {
            "for the difference that was seen to be significant after correction": needed(
                effect_, alpha=ALPHA / max(made, 1), power=POWER
            ),
            f"to show that it is smaller than {_num(margin)}": needed(
                effect_, alpha=ALPHA, power=POWER, margin=margin
            ),
        }
        takes = [
            f"{aim} with {POWER:.0%} power it takes {_count(found.seeds, 'seeds')} (now "
            f"{effect_.n_seeds}) with these examples, or {_count(found.examples, 'examples')} "
            f"(now {effect_.n_examples}) with these seeds"
            for aim, found in ways.items()
            if found is not None
        ]
        told.append(lead + ("; ".join(takes) or effect_.reason or "no spread to plan with") + ".")
    return " ".join(told)


def _count(number: int | None, what: str) -> str:
    return f"no number of {what}" if number is None else f"{number} {what}"


def _test(own: Row, other: Row) -> Test:
    parts = {name: difference(own, other, name) for name in ("forget", "retain")}
    return Test(
        function=own.function,
        own=own.method,
        other=other.method,
        effect=difference(own, other),
        parts=parts,
        mcnemar={} if parts["forget"].mean is None else _mcnemar(own, other),
    )


def _mcnemar(own: Row, other: Row) -> dict[int, McNemar]:
    answers = [{cell.place.seed: _answers(cell) for cell in row.counted} for row in (own, other)]
    found = {}
    for seed, first in answers[0].items():
        second = answers[1].get(seed)
        if first and second and len(first) == len(second):
            found[seed] = mcnemar(first, second)
    return found


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


def _num(value: float) -> str:
    """.41, without the leading zero."""
    text = f"{value:.2f}"
    return "0" if float(text) == 0 else text.replace("0.", ".", 1) if abs(value) < 1 else text


def _p(value: float) -> str:
    if value < LEAST_P:
        return "p < .001"
    return f"p = {value:.3f}".replace("0.", ".", 1) if value < 0.9995 else "p = 1"
