"""Which questions changed sides: those the base got right and the patched model wrong, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.records import RunRecord

Side = Literal["forget", "retain"]
# A question that several choices tie on is worth a share; right is more than half of it.
RIGHT = 0.5
# Questions listed in full, of each kind of change.
LISTED = 30


@dataclass(frozen=True)
class Flip:
    """A question that changed sides.

    Attributes:
        runs: in how many; ``of`` as many as asked it.
    """

    question: str
    runs: int
    of: int


@dataclass(frozen=True)
class Flips:
    """What became of the questions of one side, summed over runs.

    Attributes:
        lost: right before, wrong after; the ones that changed most often come first.
        won: wrong before, right after.
        asked: answers in all; ``n_lost`` and ``n_won`` of them changed.
    """

    side: Side
    runs: int
    asked: int
    n_lost: int
    n_won: int
    lost: tuple[Flip, ...]
    won: tuple[Flip, ...]

    @property
    def more(self) -> tuple[int, int]:
        """Questions of either kind that are not listed."""
        return max(0, len(self.lost) - LISTED), max(0, len(self.won) - LISTED)


def flips(side: Side, runs: Sequence[RunRecord]) -> Flips | None:
    """The changes on one side; None where no run keeps its answers."""
    asked: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    won: Counter[str] = Counter()
    counted = 0
    for run in runs:
        before, after = (_answers(run, side, model) for model in ("base", "patched"))
        if not before or len(before) != len(after):
            continue
        counted += 1
        for name, old, new in zip(_names(run, side, len(before)), before, after, strict=True):
            if old is None or new is None:
                continue
            asked[name] += 1
            lost[name] += old > RIGHT >= new
            won[name] += new > RIGHT >= old
    if not asked:
        return None
    return Flips(
        side,
        counted,
        asked.total(),
        lost.total(),
        won.total(),
        *(
            tuple(Flip(name, n, asked[name]) for name, n in found.most_common() if n)
            for found in (lost, won)
        ),
    )


def _answers(run: RunRecord, side: Side, model: str) -> list[float | None]:
    for values in run.values:
        if (values.name, values.model) == (f"{side}_accuracy", model):
            return values.values
    return []


def _names(run: RunRecord, side: Side, n: int) -> list[str]:
    """The wording of each question, or its number; one that comes twice gets a number too."""
    told = run.asked.get(side, [])
    seen: Counter[str] = Counter()
    found = []
    for at in range(n):
        name = _bare(str(told[at])) if at < len(told) else f"question {at + 1}"
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _bare(asked: str) -> str:
    """A question without the frame that the model is asked in."""
    return asked.strip().removeprefix("Question:").removesuffix("Answer:").strip()
