"""How rude a model's continuations are, and what came in the place of rudeness.

    suite = ToxicitySuite.build(tokenizer, split="test", prompts={"openings": texts}, …)
    of_base = suite.collect(base)                               # needs the model's weights
    with patch.applied(base):
        of_patched = suite.collect(base)
    suite.judge(of_patched, base, of_base, "patched")           # needs the base's weights

Collecting is apart from judging, because a patched model and its base are one model whose weights
take turns. Scores per set of prompts: ``fluency`` (perplexity of the continuations under the
base), ``distinct_2``, ``empty_rate``; per set and scorer: ``toxicity_rate``,
``expected_max_toxicity``, ``toxicity_mean``; and ``neutral_nll`` (the pairs' neutral wording after
the opening that both share), ``kl_to_base`` on neutral text, and the summary ``detoxification``
with its three parts (`detoxification`).

A prompt is one example, its value taken over its continuations, so intervals rest on prompts. An
empty continuation is not scored: silence is no politeness, it shows as ``empty_rate``.

Rates and expected maximum: Gehman et al. 2020 (arXiv:2009.11462), where the rate is that of
prompts with a toxic continuation among 25; here it is the share of toxic continuations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from expunge.data.text import Pair, Text
from expunge.evaluation import detoxification
from expunge.evaluation.columns import (
    KINDS,
    Column,
    Continued,
    distinct_2,
    judge,
    nats_per_token,
    over_prompts,
    row,
)
from expunge.evaluation.detoxification import Ingredients, Values
from expunge.evaluation.divergence import divergence, next_logprobs
from expunge.evaluation.examples import Examples
from expunge.evaluation.generation import Sampling, continuations
from expunge.evaluation.likelihood import OnProgress, Scored, score
from expunge.evaluation.prepared import Prepared, prepare_texts
from expunge.evaluation.scorers import THRESHOLD, Remembered, Scorer
from expunge.evaluation.stats import to_score
from expunge.records import ModelRole, Sample, Score, Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prompts of each set whose continuations a record keeps.
SAMPLES = 20


@dataclass(frozen=True, eq=False)
class Collected:
    """All that is needed of one model's weights.

    Attributes:
        continued: by the prompt set's name.
        neutral: log-probability and tokens of each pair's neutral wording after the opening.
        logprobs: next-token log-probabilities on each neutral text, `next_logprobs`.
    """

    continued: Mapping[str, Continued]
    neutral: list[list[Scored]]
    logprobs: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class ToxicitySuite:
    """Prompts, pairs and neutral texts of one split, tokenised once; made by `build`.

    Attributes:
        prompts: sets of prompts by name. The summary rests on the first.
        pairs: the neutral wordings, scored after the opening.
        neutral: texts on which the model is compared with the base.
        row_batch, text_batch: rows in one forward of continuations and of texts.
    """

    tokenizer: PreTrainedTokenizerBase
    split: Split
    prompts: Mapping[str, tuple[str, ...]]
    pairs: Prepared
    neutral: Prepared
    scorers: tuple[Scorer, ...]
    sampling: Sampling
    row_batch: int = 128
    text_batch: int = 16

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: Split,
        prompts: Mapping[str, Sequence[Text]],
        pairs: Sequence[Pair],
        neutral_texts: Sequence[Text],
        scorers: Sequence[Scorer],
        sampling: Sampling,
        max_tokens: int,
    ) -> ToxicitySuite:
        """Tokenise every set; an absent one yields unscored Scores with a reason.

        Args:
            pairs: those without a shared opening are left unscored.
            max_tokens: texts and wordings are cut there; prompts never are.
        """
        # Where there is no opening all counts as context, and nothing is left to score.
        wordings = [
            pair.after_opening if pair.opening else Text(pair.neutral, len(pair.neutral))
            for pair in pairs
        ]
        return cls(
            tokenizer=tokenizer,
            split=split,
            prompts={name: tuple(one.text for one in given) for name, given in prompts.items()},
            pairs=prepare_texts(tokenizer, wordings, max_tokens=max_tokens),
            neutral=prepare_texts(tokenizer, neutral_texts, max_tokens=max_tokens),
            scorers=tuple(Remembered(scorer) for scorer in scorers),
            sampling=sampling,
        )

    @property
    def rows(self) -> int:
        """What the `OnProgress` counts of one `collect` add up to."""
        return self.judge_rows + self.pairs.rows + self.neutral.rows

    @property
    def judge_rows(self) -> int:
        """What the `OnProgress` counts of one `judge` add up to: the continuations."""
        return sum(map(len, self.prompts.values())) * self.sampling.samples

    def collect(self, model: PreTrainedModel, on_progress: OnProgress | None = None) -> Collected:
        """Everything that takes the model's own weights.

        Raises:
            DataError: a prompt is empty, or too long for the context.
            ResourceError: out of memory with a single row.
        """
        return Collected(
            continued={
                name: continuations(
                    model, self.tokenizer, given, self.sampling, on_progress=on_progress
                )
                for name, given in self.prompts.items()
            },
            neutral=score(model, self.pairs, batch_size=self.text_batch, on_progress=on_progress),
            logprobs=next_logprobs(
                model, self.neutral, batch_size=self.text_batch, on_progress=on_progress
            ),
        )

    def judge(
        self,
        collected: Collected,
        base: PreTrainedModel,
        of_base: Collected,
        role: ModelRole,
        on_progress: OnProgress | None = None,
    ) -> tuple[list[Score], dict[str, Examples]]:
        """The scores of one model, and the examples behind them by `Examples.key`.

        Args:
            collected: of the model that is judged.
            base: with its own weights, no patch applied.
            of_base: `collect` of the base; the same object where the base is judged.

        The base's continuations are scored once, however many models are judged.
        """
        columns: list[Column] = []
        for name in self.prompts:
            columns += self._of_prompts(name, collected.continued[name], base, on_progress)
        neutral = Column(
            name="neutral_nll",
            values=nats_per_token(collected.neutral),
            unit="nats/token",
            higher_is="worse",
            reason="nothing follows a shared opening",
            none="no pairs",
        )
        kl = Column(
            name="kl_to_base",
            values=divergence(of_base.logprobs, collected.logprobs),
            unit="nats/token",
            higher_is="worse",
            reason="fewer than two tokens, beyond the memory kept, or another vocabulary",
            none="no neutral texts",
        )
        found = [column.examples() for column in (*columns, neutral, kl)]
        results = [to_score(one, model=role, split=self.split) for one in found]
        first = next(iter(self.prompts), None)
        given = self._ingredients(first, columns, neutral.values, of_base)
        results += detoxification.summary(given, model=role, split=self.split, prompts=first)
        return results, {one.key: one for one in found}

    def samples(self, said: Mapping[ModelRole, Collected], limit: int = SAMPLES) -> list[Sample]:
        """How each model goes on from the first prompts of each set, and who flags it."""
        found = []
        for name, prompts in self.prompts.items():
            first = {
                role: [own[0].text for own in one.continued[name][:limit]]
                for role, one in said.items()
            }
            flags = {
                (role, scorer.name): [
                    score is not None and score >= THRESHOLD for score in scorer.score(texts)
                ]
                for role, texts in first.items()
                for scorer in self.scorers
            }
            for at, prompt in enumerate(prompts[:limit]):
                flagged = {
                    role: [scorer.name for scorer in self.scorers if flags[role, scorer.name][at]]
                    for role in first
                }
                texts = {str(role): own[at] for role, own in first.items()}
                found.append(Sample(name, prompt, texts, {str(k): v for k, v in flagged.items()}))
        return found

    def _of_prompts(
        self,
        name: str,
        continued: Continued,
        base: PreTrainedModel,
        on_progress: OnProgress | None,
    ) -> list[Column]:
        """The columns of one set of prompts."""
        prepared = Prepared(tuple(tuple(map(row, own)) for own in continued))
        scored = score(base, prepared, batch_size=self.row_batch, on_progress=on_progress)
        empty, common = "every continuation was empty", {"prompts": name, "none": "no prompts"}
        columns = [
            Column("fluency", nats_per_token(scored), "perplexity", "worse", empty, **common),
            Column(
                name="distinct_2",
                values=[distinct_2(own) for own in continued],
                unit="fraction",
                higher_is="better",
                reason="no continuation of two words",
                **common,
            ),
            Column(
                name="empty_rate",
                values=[(sum(one.empty for one in own) / len(own), 1.0) for own in continued],
                unit="fraction",
                higher_is="worse",
                reason=empty,
                **common,
            ),
        ]
        for scorer in self.scorers:
            judged = judge(scorer, continued)
            lost = sum(value is None for own in judged for value in own)
            note = f"{lost} of {sum(map(len, judged))} continuations were empty or unscorable"
            columns += [
                Column(
                    name=kind,
                    values=over_prompts(judged, over),
                    unit="fraction",
                    higher_is="worse",
                    reason=empty,
                    note=note if lost else None,
                    scorer=scorer.name,
                    **common,
                )
                for kind, over in KINDS.items()
            ]
        return columns

    def _ingredients(
        self,
        first: str | None,
        columns: Sequence[Column],
        neutral: Values,
        of_base: Collected,
    ) -> Ingredients:
        """What the summary rests on: the first set of prompts, pairs and neutral texts."""
        own = [column for column in columns if column.prompts == first]
        rate = KINDS["toxicity_rate"]
        base_rates = {
            scorer.name: over_prompts(judge(scorer, of_base.continued[first]), rate)
            for scorer in self.scorers
            if first is not None
        }
        return Ingredients(
            rates={one.scorer or "": one.values for one in own if one.name == "toxicity_rate"},
            base_rates=base_rates,
            fluency=next((one.values for one in own if one.name == "fluency"), ()),
            neutral=neutral,
            base_neutral=nats_per_token(of_base.neutral),
        )
