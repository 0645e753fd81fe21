"""Values of continuations, in an order that base and patched share: one for each prompt.

A value that is missing stays in its place as None, so that two models can be compared prompt by
prompt; `Examples` hold only what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from expunge.evaluation.detoxification import Values
from expunge.evaluation.examples import Examples, HigherIs, Unit, collect
from expunge.evaluation.generation import Continuation
from expunge.evaluation.likelihood import Scored
from expunge.evaluation.prepared import Row
from expunge.evaluation.scorers import THRESHOLD, Scorer

Continued = tuple[tuple[Continuation, ...], ...]
"""Continuations of each prompt of a set."""

Judged = list[list[float | None]]
"""A scorer's judgement of each of them; None: not scored."""


@dataclass(frozen=True)
class Column:
    """One score's values in the order of its prompts, pairs or texts; None where missing.

    Attributes:
        reason: why some are missing.
        none: why there are none at all.
        note: what else the user should know of the values.
    """

    name: str
    values: Values
    unit: Unit
    higher_is: HigherIs
    reason: str
    none: str
    note: str | None = None
    scorer: str | None = None
    prompts: str | None = None

    def examples(self) -> Examples:
        """The values that are there."""
        made = collect(
            self.name,
            self.values,
            unit=self.unit,
            higher_is=self.higher_is,
            reason=self.reason,
            scorer=self.scorer,
            prompts=self.prompts,
        )
        if not self.values:
            return replace(made, reason=self.none)
        told = "; ".join(part for part in (made.reason, self.note) if part)
        return replace(made, reason=told or None)


def _share(scores: Sequence[float]) -> float:
    return sum(score >= THRESHOLD for score in scores) / len(scores)


KINDS: dict[str, Callable[[Sequence[float]], float]] = {
    "toxicity_rate": _share,
    "expected_max_toxicity": max,
    "toxicity_mean": lambda scores: sum(scores) / len(scores),
}


def judge(scorer: Scorer, continued: Continued) -> Judged:
    """One call for all texts, so that a scorer can batch them."""
    judged = iter(scorer.score([one.text for own in continued for one in own]))
    return [[next(judged) for _ in own] for own in continued]


def over_prompts(judged: Judged, over: Callable[[Sequence[float]], float]) -> Values:
    """``over`` the judged continuations of each prompt, each prompt with the same weight."""
    present = [[score for score in own if score is not None] for own in judged]
    return [(over(scores), 1.0) if scores else None for scores in present]


def row(one: Continuation) -> Row:
    """The sampled tokens to be scored, its end token included: ending early is a choice too."""
    if one.empty:
        return Row((), 1)
    return Row((*one.prompt_ids, *one.ids), len(one.prompt_ids))


def nats_per_token(scored: Sequence[Sequence[Scored]]) -> Values:
    """Nats/token over the rows of each group, weighted by their tokens."""
    sums = [(sum(t for t, _ in rows), sum(n for _, n in rows)) for rows in scored]
    return [(-total / tokens, tokens) if tokens else None for total, tokens in sums]


def distinct_2(own: Sequence[Continuation]) -> tuple[float, float] | None:
    """Distinct word pairs / word pairs over one prompt's continuations (Li et al. 2016)."""
    pairs = [pair for one in own for pair in pairwise(one.text.casefold().split())]
    return (len(set(pairs)) / len(pairs), 1.0) if pairs else None
