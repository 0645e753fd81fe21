"""What the tests say of the claim that each function needs an objective of its own.

Two of them settle it: each function's own objective against the other function's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.comparison.testing import ALPHA, Test
from expunge.evaluation.power import MOST_SEEDS, MOST_TIMES, needed
from expunge.evaluation.significance import Effect, above, below, equivalence

Word = Literal["specialised", "interchangeable", "one objective for both", "crossed", "undecided"]
LEAST_P = 0.001
MARGIN = 0.05
POWER = 0.8
MEASURE = " of the harmonic mean of forgetting and retaining"


@dataclass(frozen=True)
class Verdict:
    """What the matrix says of the claim.

    Attributes:
        word: the first of these that holds. ``interchangeable``: both differences lie within the
            margin, by two one-sided tests; they may be significant, but are too small to need an
            objective of its own. ``one objective for both``: one of the two is significantly better
            on a function and, on the other, better or at least not worse by the margin.
            ``specialised``: each own objective is significantly better on its function than the
            other function's own. ``undecided``: none.
        primary: the two tests it rests on.
        power: what would decide it.
    """

    word: Word
    sentence: str
    primary: tuple[Test, Test]
    power: str


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
    if a.worse and b.worse:
        told += "; each is better on the other function than on its own"
    sentence = f"{word.capitalize()}: {told}."
    return Verdict(word, sentence, (a, b), _power(word, (a, b), made, margin)), None


def _word(a: Test, b: Test, margin: float) -> Word:
    if all(_shown(equivalence(test.effect, margin)) for test in (a, b)):
        return "interchangeable"
    for one, other in ((a, b), (b, a)):
        # The own objective of ``one`` is the other method in ``other``.
        enough = _shown(above(one.effect, -margin)) and _shown(below(other.effect, margin))
        if enough and (one.better or other.worse):
            return "one objective for both"
    if a.worse and b.worse:
        return "crossed"
    return "specialised" if a.better and b.better else "undecided"


def _shown(p: float | None) -> bool:
    return p is not None and p < ALPHA


def _told(test: Test, margin: float, of_what: str = "", after: str = "") -> str:
    """One test in words, with its numbers; the first also says what they are numbers of."""
    found = test.effect
    assert found.mean is not None
    lead = f"on {test.function} {test.own} "
    if found.p is None or test.p_adjusted is None:
        partial = ""
        if found.partial is not None:
            low, high = found.partial.ci_low, found.partial.ci_high
            this = "this seed" if found.partial.over == "examples" else "these examples"
            partial = f" [{_num(low)}, {_num(high)}] over {found.partial.over} of {this} alone,"
        return (
            f"{lead}differs from {test.other} by {_num(found.mean)}{of_what},{partial} "
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
    within = ""
    same, ahead = equivalence(found, margin), below(found, margin)
    if same is not None and _shown(same):
        within = f"; smaller than {_num(margin)}, {_p(same)}"
    elif ahead is not None and _shown(ahead) and not test.worse:
        within = f"; ahead by less than {_num(margin)}, {_p(ahead)}"
    return f"{lead}{verb} ({_p(test.p_adjusted)}{after}{within})"


def _interval(found: Effect) -> str:
    """The interval, turned round where the effect is negative: the sentence tells its size."""
    assert found.mean is not None and found.ci_low is not None and found.ci_high is not None
    low, high = (
        (found.ci_low, found.ci_high) if found.mean >= 0 else (-found.ci_high, -found.ci_low)
    )
    return f"[{_num(low)}, {_num(high)}]"


def _power(word: Word, primary: Sequence[Test], made: int, margin: float) -> str:
    """What it would take to decide the tests that leave it open."""
    open_tests = [test for test in primary if not (test.better or test.worse)]
    if word != "undecided" or not open_tests:
        return "It is decided with these seeds and examples."
    told = []
    for test in open_tests:
        lead = f"On {test.function}, {test.own} against {test.other}: "
        # The smallest p of a family must pass this; later ones have it easier.
        seen = test.effect
        ways = {
            "for the difference that was seen to be significant after correction": needed(
                seen, alpha=ALPHA / max(made, 1), power=POWER
            ),
            f"to show that it is smaller than {_num(margin)}": needed(
                seen, alpha=ALPHA, power=POWER, margin=margin
            ),
        }
        takes = [
            f"{aim} with {POWER:.0%} power it takes {_count(found.seeds, MOST_SEEDS)} seeds (now "
            f"{seen.n_seeds}) with these examples, or "
            f"{_count(found.examples, MOST_TIMES * seen.n_examples)} examples (now "
            f"{seen.n_examples}) with these seeds"
            for aim, found in ways.items()
            if found is not None
        ]
        told.append(lead + ("; ".join(takes) or seen.reason or "no spread to plan with") + ".")
    return " ".join(told)


def _count(number: int | None, most: int) -> str:
    return f"more than {most}" if number is None else str(number)


def _num(value: float) -> str:
    """.41, without the leading zero."""
    text = f"{value:.2f}"
    return "0" if float(text) == 0 else text.replace("0.", ".", 1) if abs(value) < 1 else text


def _p(value: float) -> str:
    if value < LEAST_P:
        return "p < .001"
    return f"p = {value:.3f}".replace("0.", ".", 1) if value < 0.9995 else "p = 1"
