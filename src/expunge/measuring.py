"""The measuring side of a bench: the whole base and its suites, the scores of three models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from expunge.data.text import Text
from expunge.edits import Intervention
from expunge.errors import DataError
from expunge.evaluation.examples import Examples
from expunge.evaluation.generation import SAMPLING, Sampling
from expunge.evaluation.scorers import Scorer
from expunge.evaluation.stats import to_values
from expunge.evaluation.suite import Suite
from expunge.evaluation.toxicity import Collected, ToxicitySuite
from expunge.functions.base import Measured
from expunge.model.patch import Patch
from expunge.progress import Progress
from expunge.records import ModelRole, Sample, Score, Split, Values

# What a run leaves: changed weights, or something that acts while the model runs.
Artefact = Patch | Intervention


# Questions whose wording a record keeps, of each side.
ASKED = 300


@dataclass(frozen=True)
class Measurements:
    """What was measured of base, patched and oracle, in this order.

    Attributes:
        values: behind the scores, example by example.
        asked: side -> the wording of its first questions.
        samples: what the models said to the first prompts.
    """

    scores: list[Score] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    asked: dict[str, list[str]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class _OfOne:
    """What was measured of one model."""

    role: ModelRole
    scores: list[Score]
    values: list[Values]
    said: Collected | None


class Measuring:
    """Scores on the same data of a base, of patches to it, of models never taught the function.

    Base and oracles are measured once a split.

    Args:
        base: directory or hub name of the base.
        measured: the data of each split.
        open_model: directory or hub name -> (whole model, tokenizer).
        max_tokens: longest text in tokens.
        progress: told what is going on.
        scorers: what judges continuations; none needed where there are no prompts.
        sampling: how prompts are continued.
        max_prompts: largest number of prompts of a set.
    """

    def __init__(
        self,
        base: str,
        measured: Mapping[Split, Measured],
        *,
        open_model: Callable[[str], tuple[Any, Any]],
        max_tokens: int,
        progress: Progress,
        scorers: tuple[Scorer, ...] = (),
        sampling: Sampling = SAMPLING,
        max_prompts: int = 200,
    ) -> None:
        self.scorers, self.sampling, self.max_prompts = scorers, sampling, max_prompts
        self.base, self.measured, self.max_tokens = base, measured, max_tokens
        self.open_model, self.progress = open_model, progress
        self._base: dict[Split, _OfOne] = {}
        self._oracles: dict[tuple[str, Split], _OfOne] = {}

    def measure(
        self, patch: Artefact | None, *, oracle: str | None = None, split: Split = "test"
    ) -> Measurements:
        """Measure base, patched and oracle."""
        model, _ = self.whole
        if split not in self._base:
            self._base[split] = self._judged(*self._look(model, "base", split), "base", split)
        found = [self._base[split]]
        if patch is not None:
            with patch.applied(model):
                seen = self._look(model, "patched", split)
            # Judged with the base's own weights back: it tells how fluent a continuation is.
            found.append(self._judged(*seen, "patched", split))
        if oracle is not None:
            found.append(self._of_oracle(oracle, split))
        said = {one.role: one.said for one in found if one.said is not None}
        return Measurements(
            scores=[score for one in found for score in one.scores],
            values=[values for one in found for values in one.values],
            asked=self._suites[split].asked(ASKED),
            samples=self._toxicity[split].samples(said) if said else [],
        )

    @cached_property
    def whole(self) -> tuple[Any, Any]:
        """The base with its head, and the tokenizer."""
        return self.open_model(self.base)

    @cached_property
    def _suites(self) -> dict[Split, Suite]:
        _, tokenizer = self.whole
        found = {}
        for split, data in self.measured.items():
            sides = ("forget_questions", "retain_questions", "forget_texts", "retain_texts")
            found[split] = Suite.build(
                tokenizer,
                split=split,
                max_tokens=self.max_tokens,
                perplexity_texts=data.perplexity_texts,
                # A manner has no questions: what is forgotten is measured on continuations.
                forget=not data.prompts or bool(data.forget_questions),
                **{name: getattr(data, name) for name in sides},
            )
        return found

    @cached_property
    def _toxicity(self) -> dict[Split, ToxicitySuite]:
        _, tokenizer = self.whole
        return {
            split: ToxicitySuite.build(
                tokenizer,
                split=split,
                prompts={k: texts[: self.max_prompts] for k, texts in data.prompts.items()},
                pairs=data.pairs,
                neutral_texts=[Text(pair.neutral) for pair in data.pairs] or data.retain_texts,
                scorers=self.scorers,
                sampling=self.sampling,
                max_tokens=self.max_tokens,
            )
            for split, data in self.measured.items()
            if data.prompts
        }

    def _of_oracle(self, oracle: str, split: Split) -> _OfOne:
        if (oracle, split) not in self._oracles:
            model, tokenizer = self.open_model(oracle)
            _, own = self.whole
            _check_same_tokenizer(own, tokenizer, oracle)
            seen = self._look(model, "oracle", split)
            self._oracles[oracle, split] = self._judged(*seen, "oracle", split)
        return self._oracles[oracle, split]

    def _look(
        self, model: Any, role: ModelRole, split: Split
    ) -> tuple[list[Score], list[Examples], Collected | None]:
        """Everything that takes the model itself: scores, and what it says to the prompts."""
        suite, toxicity = self._suites[split], self._toxicity.get(split)
        rows = suite.rows + (toxicity.rows if toxicity else 0)
        with self.progress.phase(f"measure {role}", rows) as advance:
            scores, examples = suite.measure(model, role, advance)
            said = toxicity.collect(model, advance) if toxicity else None
        return scores, list(examples.values()), said

    def _judged(
        self,
        scores: list[Score],
        examples: list[Examples],
        said: Collected | None,
        role: ModelRole,
        split: Split,
    ) -> _OfOne:
        if said is not None:
            base, _ = self.whole
            known = self._base.get(split)
            of_base = known.said if known is not None and known.said is not None else said
            judged, behind = self._toxicity[split].judge(said, base, of_base, role)
            scores, examples = scores + judged, examples + list(behind.values())
        values = [to_values(one, model=role, split=split) for one in examples]
        return _OfOne(role, scores, values, said)


def _check_same_tokenizer(base: Any, other: Any, name: str) -> None:
    if base.get_vocab() != other.get_vocab():
        raise DataError(
            what="The oracle has another vocabulary than the base, so their scores do not compare",
            got=name,
            allowed="a model with the base's tokenizer",
            fix="leave --oracle out, or retrain the oracle with the base's tokenizer",
        )
