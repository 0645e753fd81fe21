"""The measurements of one run: its data tokenised once, its scores taken for many models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.data.text import Question, Text
from expunge.evaluation.examples import Examples, HigherIs, missing
from expunge.evaluation.fluency import nll, perplexity
from expunge.evaluation.likelihood import OnProgress, score
from expunge.evaluation.multiple_choice import accuracy, answer_nll, prepare_questions
from expunge.evaluation.prepared import Prepared, prepare_texts
from expunge.evaluation.stats import to_score
from expunge.records import ModelRole, Score, Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORDER = ("forget_accuracy", "retain_accuracy", "forget_nll", "retain_nll", "perplexity")


@dataclass(frozen=True)
class Side:
    """The forget or the retain set: questions where there are any, else texts."""

    name: str
    questions: tuple[Question, ...]
    prepared: Prepared

    @classmethod
    def build(
        cls,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        texts: Sequence[Text],
        max_tokens: int,
    ) -> Side:
        """Tokenise the questions, or the texts if there is no question."""
        if questions:
            prepared = prepare_questions(tokenizer, questions, max_tokens=max_tokens)
        else:
            prepared = prepare_texts(tokenizer, texts, max_tokens=max_tokens)
        return cls(name, tuple(questions), prepared)

    def measure(
        self,
        model: PreTrainedModel,
        batch_size: int,
        on_progress: OnProgress | None,
        *,
        accuracy_is: HigherIs,
        nll_is: HigherIs,
    ) -> list[Examples]:
        """Accuracy and nats/token, from one pass over the rows."""
        accuracy_name, nll_name = f"{self.name}_accuracy", f"{self.name}_nll"
        scored = score(model, self.prepared, batch_size=batch_size, on_progress=on_progress)
        if self.questions:
            return [
                accuracy(self.questions, scored, name=accuracy_name, higher_is=accuracy_is),
                answer_nll(self.questions, scored, name=nll_name, higher_is=nll_is),
            ]
        none = f"no {self.name} questions"
        no_accuracy = missing(accuracy_name, unit="fraction", higher_is=accuracy_is, reason=none)
        if scored:
            return [no_accuracy, nll(scored, name=nll_name, higher_is=nll_is)]
        none = f"no {self.name} questions and no {self.name} texts"
        return [no_accuracy, missing(nll_name, unit="nats/token", higher_is=nll_is, reason=none)]


@dataclass(frozen=True)
class Suite:
    """Prepared data of one split; made by `Suite.build`.

    Attributes:
        question_batch, text_batch: rows in one forward. Questions are short and share their
            prompts; texts need logits at every position.
    """

    split: Split
    forget: Side | None
    retain: Side
    perplexity_texts: Prepared
    question_batch: int = 128
    text_batch: int = 16

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: Split,
        max_tokens: int,
        forget_questions: Sequence[Question] = (),
        retain_questions: Sequence[Question] = (),
        forget_texts: Sequence[Text] = (),
        retain_texts: Sequence[Text] = (),
        perplexity_texts: Sequence[Text] = (),
        forget: bool = True,
        question_batch: int = 128,
        text_batch: int = 16,
    ) -> Suite:
        """Tokenise every set given; an absent one yields unscored Scores with a reason.

        Args:
            max_tokens: texts are cut there; longer questions are skipped, and counted as skipped.
            forget: whether there is a forget side at all; without it, no score of it.
        """
        return cls(
            split=split,
            forget=Side.build("forget", tokenizer, forget_questions, forget_texts, max_tokens)
            if forget
            else None,
            retain=Side.build("retain", tokenizer, retain_questions, retain_texts, max_tokens),
            perplexity_texts=prepare_texts(tokenizer, perplexity_texts, max_tokens=max_tokens),
            question_batch=question_batch,
            text_batch=text_batch,
        )

    @property
    def rows(self) -> int:
        """What the `OnProgress` counts of one `measure` add up to."""
        forget = self.forget.prepared.rows if self.forget else 0
        return forget + self.retain.prepared.rows + self.perplexity_texts.rows

    def asked(self, limit: int) -> dict[str, list[str]]:
        """Side -> the wording of its first questions, in the order of the accuracies' values."""
        sides = [side for side in (self.forget, self.retain) if side is not None]
        return {
            side.name: [question.prompt for question in side.questions[:limit]]
            for side in sides
            if side.questions
        }

    def measure(
        self, model: PreTrainedModel, role: ModelRole, on_progress: OnProgress | None = None
    ) -> tuple[list[Score], dict[str, Examples]]:
        """The scores of one model, and the examples behind them by name.

        ``forget_accuracy`` (higher is worse), ``retain_accuracy`` (better), ``forget_nll`` (better:
        more is forgotten), ``retain_nll`` and ``perplexity`` (worse), always these five, or the
        three of them that a suite without a forget side has. Both nll are taken on the questions'
        true wordings where there are questions, else on the texts.
        """
        examples: list[Examples] = []
        if self.forget:
            examples += self.forget.measure(
                model, self._batch(self.forget), on_progress, accuracy_is="worse", nll_is="better"
            )
        examples += self.retain.measure(
            model, self._batch(self.retain), on_progress, accuracy_is="better", nll_is="worse"
        )
        fluency = missing(
            "perplexity", unit="perplexity", higher_is="worse", reason="no perplexity texts"
        )
        if self.perplexity_texts.groups:
            texts = self.perplexity_texts
            fluency = perplexity(
                score(model, texts, batch_size=self.text_batch, on_progress=on_progress)
            )
        examples = sorted([*examples, fluency], key=lambda one: ORDER.index(one.name))
        scores = [to_score(one, model=role, split=self.split) for one in examples]
        return scores, {one.name: one for one in examples}

    def _batch(self, side: Side) -> int:
        return self.question_batch if side.questions else self.text_batch
