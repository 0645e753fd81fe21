"""Questions with choices: is the right one the likeliest, and how likely is the true wording?

Covers MMLU/WMDP-style questions and TOFU's paraphrased answer against perturbed ones (TOFU,
arXiv:2401.06121; its choices hold the paraphrase and the wrong answers, its ``truth`` the original
answer). Deviation: the lm-evaluation-harness normalises a choice's log-likelihood by its bytes
(``acc_norm``) or not at all (``acc``); here it is divided by its tokens, as in
TOFU's probabilities.

    prepared = prepare_questions(tokenizer, questions)         # once
    scored = score(model, prepared, batch_size=256)            # for each model
    accuracy(questions, scored), answer_nll(questions, scored)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from expunge.data.text import Question
from expunge.evaluation.examples import Examples, HigherIs, collect
from expunge.evaluation.likelihood import Scored
from expunge.evaluation.prepared import Prepared, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIE = 1e-6
"""Nats/token: choices closer than this are equal; float32 tells no more."""


def prepare_questions(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_tokens: int | None = None,
) -> Prepared:
    """Tokenise each question's choices and, where it is not one of them, its true wording."""
    prompts = [question.prompt for question in questions]
    wordings = [_wordings(question) for question in questions]
    return prepare(tokenizer, prompts, wordings, max_tokens=max_tokens)


def accuracy(
    questions: Sequence[Question],
    scored: Sequence[Sequence[Scored]],
    *,
    name: str = "accuracy",
    higher_is: HigherIs = "better",
) -> Examples:
    """1 where the right choice has strictly the highest mean nats/token, else 0.

    A right choice that ties with others for the highest counts 1/k, with k the choices in the tie:
    what picking one of them at random would reach. ``chance`` is the mean of 1/choices over the
    questions scored.

    Args:
        scored: what `likelihood.score` gave for `prepare_questions` of the same questions.
    """
    values = [_hit(question, rows) for question, rows in zip(questions, scored, strict=True)]
    pairs = zip(questions, values, strict=True)
    chances = [question.chance for question, value in pairs if value is not None]
    return collect(
        name,
        [None if value is None else (value, 1.0) for value in values],
        unit="fraction",
        higher_is=higher_is,
        chance=sum(chances) / len(chances) if chances else None,
        reason="a choice has no token of its own, is too long, or has no finite likelihood",
    )


def answer_nll(
    questions: Sequence[Question],
    scored: Sequence[Sequence[Scored]],
    *,
    name: str = "nll",
    higher_is: HigherIs = "worse",
) -> Examples:
    """Nats/token of each question's true wording, weighted by its tokens."""
    truths = [
        rows[_wordings(question).index(question.truth)]
        for question, rows in zip(questions, scored, strict=True)
    ]
    return collect(
        name,
        [(-total / tokens, tokens) if tokens else None for total, tokens in truths],
        unit="nats/token",
        higher_is=higher_is,
        reason="the true answer has no token of its own, is too long, or has no finite likelihood",
    )


def _wordings(question: Question) -> tuple[str, ...]:
    """The choices, then the true wording if it is not among them."""
    if question.truth in question.choices:
        return question.choices
    return (*question.choices, question.truth)


def _hit(question: Question, rows: Sequence[Scored]) -> float | None:
    choices = rows[: len(question.choices)]
    if not all(tokens and math.isfinite(total) for total, tokens in choices):
        return None
    means = [total / tokens for total, tokens in choices]
    best = max(means)
    winners = [at for at, mean in enumerate(means) if best - mean < TIE]
    return 1 / len(winners) if question.answer in winners else 0.0
