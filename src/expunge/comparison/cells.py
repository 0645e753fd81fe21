"""The cells of a comparison: what a run says of one objective, on one function, with one seed.

Forgetting and retaining are shares against the base, in [0, 1], much as looks at validation count
them, but measured as the result of the run is, on its test split:

- forget: toxicity, the share of the base's toxic continuations of the first set of prompts that is
  gone, the mean over scorers; else, of questions, the share of what the base knew above chance
  that is gone; of texts without questions 1 − exp(−Δ), Δ the rise of their nats/token.
- retain: the worst of its parts counts. Accuracy, the share of what the base knew above chance
  that is left; perplexity and the neutral wordings' nats/token, exp(−Δ) with Δ their rise.

A part on which the base was measured and the model could not be leaves forget or retain unknown,
never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expunge.comparison.shares import RETAIN_PARTS, Share, Shares, shares_of
from expunge.errors import DataError
from expunge.records import RunRecord
from expunge.training.tradeoff import EXPLORING
from expunge.training.watch import Point

Floats = NDArray[np.float64]
Status = Literal["measured", "diverged", "missing"]
Summary = Literal["harmonic", "forget", "retain"]
RETAIN_FLOOR = 0.9
ORACLE = "oracle"
# Key of a record's training facts: why a run came to nothing.
DIVERGED = "diverged"
FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True, order=True)
class Place:
    """Which cell.

    Attributes:
        method: objective, edit, or control; a learned trade-off is told apart by its name, such as
            ``cosine-rmu (learned)``.
        function: that was to be removed and was measured.
    """

    method: str
    function: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method} on {self.function}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell.

    Attributes:
        forget, retain: shares in [0, 1]; None where the cell was not measured. One that diverged
            has forgotten nothing that counts: forget 0, retain 0.
        parts: part -> share: ``forget_accuracy`` or ``toxicity_rate/<prompts>/<scorer>``, and those
            of RETAIN_PARTS that were measured.
        hypervolume: of the point (forget, retain) above the recipe's ``retain_floor``, in [0, 1].
        spent: ``inner_steps`` and ``looks`` at validation that training and the choice of settings
            took, ``test_reads``; what is not recorded is absent.
        reason: why it was not measured, or diverged.
        lacking: part -> why it is missing.
        by_example: summary -> set of examples -> influence of each on it, (Q,); empty where the
            record has no values.
        removed: what was to be removed, where that is not the function and no record tells.
    """

    place: Place
    status: Status
    forget: float | None = None
    retain: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    hypervolume: float | None = None
    spent: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    record: RunRecord | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)
    by_example: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    removed: str | None = None

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of forget and retain; 0 where either is."""
        if self.forget is None or self.retain is None:
            return None
        total = self.forget + self.retain
        return 2 * self.forget * self.retain / total if total else 0.0

    def summary(self, name: Summary) -> float | None:
        """``harmonic``, ``forget`` or ``retain``."""
        found: float | None = getattr(self, name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the record."""
        return {
            "method": self.place.method,
            "function": self.place.function,
            "seed": self.place.seed,
            "status": self.status,
            "forget": self.forget,
            "retain": self.retain,
            "harmonic": self.harmonic,
            "hypervolume": self.hypervolume,
            "parts": dict(self.parts),
            "spent": dict(self.spent),
            "reason": self.reason,
            "lacking": dict(self.lacking),
        }


def recipe_of(record: RunRecord) -> Mapping[str, Any]:
    """The recipe in a record's provenance. Raises DataError without one."""
    recipe = record.provenance.get("recipe")
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("function"), str):
        raise DataError(
            what="A run record does not say by which recipe it was made",
            got=f"{record.objective} on {record.function}, seed {record.seed}, without a recipe",
            allowed="records as `expunge run` leaves them, with the recipe in their provenance",
            fix="run it again, or leave this record out",
        )
    return recipe


def method_name(record: RunRecord) -> str:
    """The objective; trade-offs that are not fixed by hand are named. A search adds nothing."""
    tradeoff = recipe_of(record).get("tradeoff")
    named = tradeoff in ("learned", "schedule")
    return f"{record.objective} ({tradeoff})" if named else record.objective


def place_of(record: RunRecord) -> Place:
    """Which cell a record fills. Raises DataError if it holds no recipe."""
    return Place(method_name(record), str(recipe_of(record)["function"]), record.seed)


def is_choice(record: RunRecord) -> bool:
    """Whether this was a search for settings, which is not measured itself."""
    recipe = recipe_of(record)
    return recipe.get("tradeoff") in EXPLORING and recipe.get("evaluate") is False


def cell_of(record: RunRecord) -> Cell:
    """The cell that a record fills, from the scores of its patched model.

    Raises:
        DataError: the record holds no recipe.
    """
    return _cell(place_of(record), record, shares_of(record, "patched"), spent(record))


def oracle_cell(record: RunRecord) -> Cell:
    """The cell of the model that was never taught the function, from any record that measured it.

    Raises:
        DataError: the record holds no recipe.
    """
    place = Place(ORACLE, str(recipe_of(record)["function"]), record.seed)
    if not any(score.model == "oracle" for score in record.scores):
        return Cell(place, "missing", reason="no oracle was measured")
    return _cell(place, record, shares_of(record, "oracle"), {})


def diverged_cell(place: Place, reason: str, removed: str | None = None) -> Cell:
    """The cell of a run that led nowhere: nothing forgotten that counts, nothing retained."""
    nothing = Cell(place, "diverged", forget=0.0, retain=0.0, hypervolume=0.0, reason=reason)
    return replace(nothing, removed=removed)


def spent(record: RunRecord) -> dict[str, int]:
    """Inner steps, looks at validation, readings of the test split, as far as they are recorded."""
    training = record.training
    tradeoff, last = training.get("tradeoff") or {}, training.get("last") or {}
    reads = training.get("split_reads") or {}
    found = {
        "inner_steps": tradeoff.get("inner_steps", last["step"] + 1 if "step" in last else None),
        "looks": reads.get("validation", training.get("looks")),
        "test_reads": reads.get("test"),
    }
    return {name: int(number) for name, number in found.items() if number is not None}


def _cell(place: Place, record: RunRecord, shares: Shares, used: Mapping[str, int]) -> Cell:
    forgotten, kept = list(shares.forget.values()), list(shares.retain.values())
    worst = min(kept, key=lambda share: share.raw, default=None)
    # A side with a part that only the model lacks is unknown: what is left of it could flatter.
    lost = {RETAIN if name in RETAIN_PARTS else FORGET for name in shares.unknown}
    known = forgotten and FORGET not in lost
    forget = float(np.mean([share.value for share in forgotten])) if known else None
    retain = worst.value if worst is not None and RETAIN not in lost else None
    lacking = {**shares.unusable, **shares.unknown}
    common: dict[str, Any] = {
        "parts": {k: s.value for k, s in {**shares.forget, **shares.retain}.items()},
        "spent": used,
        "record": record,
        "lacking": lacking,
    }
    if forget is None or retain is None or worst is None:
        why = [f"{name}: {reason}" for name, reason in lacking.items()]
        sides = " and ".join(
            side for side, value in ((FORGET, forget), (RETAIN, retain)) if value is None
        )
        reason = f"{sides} could not be computed: {'; '.join(why) or 'not scored'}"
        return Cell(place, "missing", forget, retain, reason=reason, **common)
    floor = float(recipe_of(record).get("retain_floor", RETAIN_FLOOR))
    return Cell(
        place,
        "measured",
        forget,
        retain,
        hypervolume=Point(forget, retain).area(floor),
        by_example=_by_example(forgotten, worst, forget, retain),
        **common,
    )


def _by_example(
    forgotten: list[Share], worst: Share, forget: float, retain: float
) -> dict[str, dict[str, Floats]]:
    """Influences on forget, retain and their harmonic mean, by set of examples."""
    if any(share.influence is None for share in (*forgotten, worst)):
        return {}
    of_forget: dict[str, Floats] = {}
    for share in forgotten:
        assert share.influence is not None
        part = share.influence / len(forgotten)
        of_forget[share.examples] = of_forget.get(share.examples, 0.0) + part
    assert worst.influence is not None
    of_retain = {worst.examples: worst.influence}
    total = forget + retain
    by_forget, by_retain = (
        (2 * retain**2 / total**2, 2 * forget**2 / total**2) if total else (0.0, 0.0)
    )
    harmonic = {name: by_forget * one for name, one in of_forget.items()}
    for name, one in of_retain.items():
        harmonic[name] = harmonic.get(name, 0.0) + by_retain * one
    return {"harmonic": harmonic, FORGET: of_forget, RETAIN: of_retain}
