"""Looks: how far a model is while it is trained, on the validation split, in two numbers.

A look gives a `Point`: how much of the function is gone and how much of the rest is left, both
against the base and in [0, 1]. The same evaluators are used as for the result, on a part of the
validation split. Where several parts of the rest are measured, the worst counts: a model that
answers all questions but writes no sentence has not kept the rest.

- ``accuracy``: shares of questions answered, from chance to the base's accuracy.
- ``likelihood``: probabilities. Of questions, that of the right choice among the choices, from
  chance to the base's. Of texts, forget 1 − exp(−Δ) and retain exp(−Δ), with Δ the rise of their
  nats/token over the base's, not below 0.
- ``representation``: angles at the layers that an objective reads: forget 1 − cos(h, h0), retain
  cos(h, h0), means over tokens, not below 0. Needs no head and no layer above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, get_args

import torch

from expunge.data.text import Pair, Question, Text
from expunge.errors import DataError
from expunge.evaluation.likelihood import Scored, score
from expunge.evaluation.multiple_choice import accuracy, prepare_questions
from expunge.evaluation.prepared import Prepared, prepare_texts
from expunge.masked import masked_mean
from expunge.model.boundaries import BoundaryStore
from expunge.model.replay import Replay
from expunge.model.segment import Segment
from expunge.objectives.retain import cosine
from expunge.training.watch import Point

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LookKind = Literal["accuracy", "likelihood", "representation"]
LOOK_KINDS: tuple[str, ...] = get_args(LookKind)
# A base this little above chance has nothing to lose that could be seen.
LEAST_KNOWN = 0.05
# Rows and tokens of a batch. A question's prompt counts once for each choice, though it is run
# once; texts differ more in length, so that large batches of them would be mostly padding.
MOST_ROWS = 512
QUESTION_TOKENS = 8192
TEXT_TOKENS = 2048


@dataclass(frozen=True)
class _Questions:
    """Questions of one side, tokenised.

    Attributes:
        by: ``accuracy``, or ``likelihood`` of the right choice.
    """

    questions: tuple[Question, ...]
    prepared: Prepared
    by: LookKind

    def value(self, scored: Sequence[Sequence[Scored]]) -> float:
        """Accuracy, or mean probability of the right choice; NaN of a model that is broken."""
        if not all(math.isfinite(total) for rows in scored for total, _ in rows):
            return math.nan
        if self.by == "likelihood":
            values = [_chosen(q, rows) for q, rows in zip(self.questions, scored, strict=True)]
        else:
            values = list(accuracy(self.questions, scored).values)
        return sum(values) / len(values)

    @property
    def chance(self) -> float:
        return sum(question.chance for question in self.questions) / len(self.questions)


@dataclass(frozen=True)
class _Texts:
    """Texts of one side, tokenised."""

    prepared: Prepared

    def value(self, scored: Sequence[Sequence[Scored]]) -> float:
        """Nats/token."""
        totals = [rows[0][0] for rows in scored]
        return -sum(totals) / max(1, sum(rows[0][1] for rows in scored))


@dataclass
class OutputLook:
    """A look at what the whole model says: kinds ``accuracy`` and ``likelihood``.

    Attributes:
        parts: name -> what is measured; names begin with ``forget`` or ``retain``.
        base: what the base reaches, part by part.
        raw: what the last look measured, part by part.
        replay: of the layers that no run changes; None: all are run at each look.
    """

    model: PreTrainedModel
    parts: Mapping[str, _Questions | _Texts]
    base: dict[str, float] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)
    replay: Replay | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: LookKind,
        *,
        forget_questions: Sequence[Question],
        retain_questions: Sequence[Question],
        forget_texts: Sequence[Text],
        retain_texts: Sequence[Text],
        pairs: Sequence[Pair],
        max_tokens: int,
        check: bool = True,
        replay: Replay | None = None,
    ) -> OutputLook:
        """Prepare a look, and measure the base: the model must hold its original weights.

        Args:
            kind: ``accuracy`` or ``likelihood``; texts are measured by likelihood in either.
            check: whether to refuse a base that answers no better than chance.
            replay: that of this look alone.

        Raises:
            DataError: nothing to measure on a side, or the base knows no more than chance.
        """
        parts: dict[str, _Questions | _Texts] = {}

        def ask(name: str, questions: Sequence[Question]) -> None:
            prepared = prepare_questions(tokenizer, questions, max_tokens=max_tokens)
            # Nothing is asked of the true wording where it is none of the choices.
            choices = [
                (question, rows[: len(question.choices)])
                for question, rows in zip(questions, prepared.groups, strict=True)
            ]
            fitting = [
                (question, rows)
                for question, rows in choices
                if all(row.start < len(row.ids) for row in rows)
            ]
            if fitting:
                asked, groups = zip(*fitting, strict=True)
                parts[name] = _Questions(asked, Prepared(groups), kind)

        def read(name: str, texts: Sequence[Text]) -> None:
            prepared = prepare_texts(tokenizer, texts, max_tokens=max_tokens)
            scored = tuple(rows for rows in prepared.groups if rows[0].start < len(rows[0].ids))
            if scored:
                parts[name] = _Texts(Prepared(scored))

        ask("forget_questions", forget_questions)
        if not forget_questions:
            # Toxic wordings after the opening that their neutral ones share, where there are pairs.
            toxic = [Text(pair.toxic, len(pair.opening)) for pair in pairs]
            read("forget_texts", toxic or forget_texts)
        ask("retain_questions", retain_questions)
        read("retain_texts", retain_texts)
        read("retain_neutral", [Text(pair.neutral, len(pair.opening)) for pair in pairs])
        look = cls(model, parts, replay=replay)
        look.base = look._measure()
        look._check_sides()
        if check:
            look._check_known()
        return look

    def __call__(self) -> Point:
        """How far the model is now."""
        self.raw = self._measure()
        shares = {name: self._kept(name) for name in self.parts}
        forget = [share for name, share in shares.items() if name.startswith("forget")]
        retain = [share for name, share in shares.items() if name.startswith("retain")]
        return Point(1 - max(forget), min(retain))

    def _measure(self) -> dict[str, float]:
        def measure() -> dict[str, float]:
            scored = _scored(self.model, self.parts, _Questions, QUESTION_TOKENS)
            scored |= _scored(self.model, self.parts, _Texts, TEXT_TOKENS)
            return {name: part.value(scored[name]) for name, part in self.parts.items()}

        return self.replay.through(measure) if self.replay else measure()

    def _kept(self, name: str) -> float:
        """Share of what the base had, in [0, 1]."""
        part, base, now = self.parts[name], self.base[name], self.raw[name]
        if not math.isfinite(now):
            return 0.0
        if isinstance(part, _Texts):
            return math.exp(-max(0.0, now - base))
        return min(max((now - part.chance) / max(base - part.chance, LEAST_KNOWN), 0.0), 1.0)

    def _check_sides(self) -> None:
        for side in ("forget", "retain"):
            if not any(name.startswith(side) for name in self.parts):
                raise DataError(
                    what=f"There is nothing to look at on the {side} side of validation",
                    got="no questions, texts or pairs held back that fit in max_tokens",
                    allowed="at least one of them",
                    fix="give questions or more texts, or --set reward=representation",
                )

    def _check_known(self) -> None:
        for name, part in self.parts.items():
            known = self.base[name]
            if isinstance(part, _Questions) and not known >= part.chance + LEAST_KNOWN:
                other = "reward=accuracy" if part.by == "likelihood" else "reward=representation"
                raise DataError(
                    what="The base answers these questions no better than by guessing, so a loss "
                    f"could not be seen by {part.by}",
                    got=f"{name.replace('_', ' ')}: {known:.3f}, chance {part.chance:.3f}",
                    allowed=f"at least {LEAST_KNOWN} above chance on validation",
                    fix=f"give questions that the model can answer, or --set {other}",
                )


@dataclass
class RepresentationLook:
    """A look at activations alone: kind ``representation``.

    Args:
        segment: the cut model.
        forget, retain: computed stores that hold references.
    """

    segment: Segment
    forget: BoundaryStore
    retain: BoundaryStore
    raw: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side, store in (("forget", self.forget), ("retain", self.retain)):
            if not store.texts:
                raise DataError(
                    what=f"There is nothing to look at on the {side} side of validation",
                    got="no texts of two tokens or more held back",
                    allowed="at least one",
                    fix="give more texts",
                )

    def __call__(self) -> Point:
        """How far the activations of either side have turned."""
        self.raw = {"forget_cos": self._cos(self.forget), "retain_cos": self._cos(self.retain)}
        # In this order NaN, of a model that is broken, becomes 0.
        forget, retain = (min(max(0.0, value), 1.0) for value in self.raw.values())
        return Point(1 - forget, retain)

    @torch.no_grad()
    def _cos(self, store: BoundaryStore) -> float:
        """Mean over tokens, then layers, of cos(h, h0); the first token of a text is left out."""
        totals, count = 0.0, 0
        for places in store.groups():
            batch = store.batch(places)
            acts = self.segment.forward(batch.boundary, batch.ids_BT, batch.mask_BT, logprobs=False)
            mask_BT = batch.mask_BT.clone()
            mask_BT[:, 0] = False
            tokens = int(mask_BT.sum())
            cosines = [
                masked_mean(cosine(h_BTD, batch.boundary.reference[layer]), mask_BT)
                for layer, h_BTD in acts.items()
            ]
            totals += float(torch.stack(cosines).mean()) * tokens
            count += tokens
        return totals / count


def _scored(
    model: PreTrainedModel,
    parts: Mapping[str, _Questions | _Texts],
    of: type[_Questions | _Texts],
    tokens: int,
) -> dict[str, list[list[Scored]]]:
    """Rows of all parts of a kind, scored together: fewer and larger products than part by part.

    Args:
        tokens: of a batch, at most.
    """
    some = {name: part.prepared.groups for name, part in parts.items() if isinstance(part, of)}
    groups = tuple(group for own in some.values() for group in own)
    found = iter(score(model, Prepared(groups), batch_size=MOST_ROWS, batch_tokens=tokens))
    return {name: list(islice(found, len(own))) for name, own in some.items()}


def _chosen(question: Question, rows: Sequence[Scored]) -> float:
    """Probability of the right choice among the choices, by mean nats/token."""
    means = [total / max(1, tokens) for total, tokens in rows]
    best = max(means)
    weights = [math.exp(mean - best) for mean in means]
    return weights[question.answer] / sum(weights)
