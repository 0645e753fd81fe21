"""What an evaluator returns: one value per example. Sums and intervals live in `stats`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from expunge.records import full_name

Unit = Literal["fraction", "nats/token", "perplexity"]
HigherIs = Literal["better", "worse"]


@dataclass(frozen=True)
class Examples:
    """One evaluator's values, one per example that could be scored.

    Attributes:
        name: ``forget_accuracy``, ``perplexity``, …
        values: in ``unit``; for ``perplexity`` each value is still in nats/token, and the unit
            tells `stats.to_score` to take the exponential of their mean.
        weights: 1 for fractions, scored tokens for nats/token and perplexity.
        unit: ``fraction``, ``nats/token`` or ``perplexity``.
        higher_is: whether a higher value is ``better`` or ``worse`` for the purpose of the run.
        chance: what guessing reaches, where that is known.
        skipped: examples that could not be scored; they are missing, not zero.
        places: where each value's example stands among all that were given; empty: one after the
            other.
        reason: why some, or all, are missing.
        scorer: what judged the texts, for values that rest on a judgement.
        prompts: the set of prompts that was continued, for values of continuations.
    """

    name: str
    values: tuple[float, ...]
    weights: tuple[float, ...]
    unit: Unit
    higher_is: HigherIs
    chance: float | None = None
    skipped: int = 0
    reason: str | None = None
    scorer: str | None = None
    prompts: str | None = None
    places: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """``toxicity_rate/openings/tfidf``; the name alone where nothing else tells them apart."""
        return full_name(self.name, self.scorer, self.prompts)


def collect(
    name: str,
    pairs: Iterable[tuple[float, float] | None],
    *,
    unit: Unit,
    higher_is: HigherIs,
    chance: float | None = None,
    reason: str,
    scorer: str | None = None,
    prompts: str | None = None,
) -> Examples:
    """`Examples` of ``(value, weight)`` pairs; None and non-finite values count as skipped.

    ``reason`` is kept only when something is missing.
    """
    given = list(pairs)
    places = [at for at, pair in enumerate(given) if pair is not None and math.isfinite(pair[0])]
    kept = [pair for pair in (given[at] for at in places) if pair is not None]
    skipped = len(given) - len(kept)
    return Examples(
        name=name,
        values=tuple(value for value, _ in kept),
        weights=tuple(weight for _, weight in kept),
        unit=unit,
        higher_is=higher_is,
        chance=chance if kept else None,
        skipped=skipped,
        reason=f"{skipped} of {len(given)} skipped: {reason}" if skipped else None,
        scorer=scorer,
        prompts=prompts,
        places=tuple(places) if skipped else (),
    )


def missing(name: str, *, unit: Unit, higher_is: HigherIs, reason: str) -> Examples:
    """No examples at all, and why."""
    return Examples(name, (), (), unit, higher_is, reason=reason)
