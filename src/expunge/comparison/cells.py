"""The cells of a comparison: what a run record says of one objective, on one function, with one seed.

Forgetting and retaining are shares against the base, in [0, 1], as a look at validation counts them,
but measured as the result of the run is, on its test split:

- forget: knowledge, the share of what the base knew above chance that is gone; toxicity, the share
  of the base's toxic continuations that is gone, the mean over scorers.
- retain: the worst of its parts counts. Accuracy, the share of what the base knew above chance
  that is left; perplexity and the neutral wordings' nats/token, exp(−Δ) with Δ their rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from expunge.records import RunRecord

Status = Literal["measured", "diverged", "missing"]
RETAIN_PARTS = ("retain_accuracy", "perplexity", "neutral_nll")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        forget, retain: shares in [0, 1]; None where the cell was not measured. One that diverged
            has forgotten nothing that counts: forget 0, retain 0.
        parts: part -> share: ``forget_accuracy`` or ``toxicity_rate/<prompts>/<scorer>``, and those
            of RETAIN_PARTS that were measured.
        spent: ``inner_steps`` and ``looks`` at validation that the choice of settings took.
        reason: why it was not measured.
    """

    place: Place
    status: Status
    forget: float | None = None
    retain: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    spent: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    record: RunRecord | None = None

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of forget and retain; 0 where either is."""
        if self.forget is None or self.retain is None:
            return None
        total = self.forget + self.retain
        return 2 * self.forget * self.retain / total if total else 0.0
