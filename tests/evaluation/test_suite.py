"""Questions, texts and the five scores of a run, by hand and on real small models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from expunge.data.text import QUESTION_TEMPLATE, Question, Text
from expunge.evaluation.examples import Examples
from expunge.evaluation.fluency import nll, perplexity
from expunge.evaluation.likelihood import score, text_nll
from expunge.evaluation.multiple_choice import accuracy, answer_nll, prepare_questions
from expunge.evaluation.suite import Suite

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="../shared holds no real models and data"
)
LETTERS = [*"abcdefghijklmnop"]
QUESTIONS = (
    Question("a b", ("c", "d e", "f"), 1, "d e"),
    Question("g", ("h", "i"), 0, "j k"),  # the truth is not among the choices, as in TOFU
)
TEXTS = (Text("a b c d e f"), Text("g h", 1), Text(""))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: at for at, word in enumerate(["<s>", "<unk>", *LETTERS])}
    built = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def mean_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean nats/token of ``answer``, by a full forward."""
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(tokenizer(prompt)["input_ids"])
    return sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(start, len(ids))) / (
        len(ids) - start
    )


def test_accuracy_by_hand() -> None:
    question = Question("p", ("a", "b", "c"), 0, "a")
    rows = {
        "right": ([(-1.0, 1), (-2.0, 1), (-3.0, 1)], 1.0),
        "right by tokens, not by sum": ([(-3.0, 3), (-2.0, 1), (-2.5, 1)], 1.0),
        "wrong": ([(-3.0, 1), (-2.0, 1), (-2.5, 1)], 0.0),
        "a tie of two": ([(-1.0, 1), (-2.0, 2), (-3.0, 1)], 0.5),
        "a tie of three": ([(-1.0, 1), (-1.0, 1), (-1.0, 1)], 1 / 3),
        "a tie without the right one": ([(-2.0, 1), (-1.0, 1), (-1.0, 1)], 0.0),
    }
    got = accuracy([question] * len(rows), [scored for scored, _ in rows.values()])
    assert got.values == tuple(value for _, value in rows.values())
    assert got.weights == (1.0,) * len(rows)
    assert got.chance == pytest.approx(1 / 3) and got.skipped == 0 and got.reason is None


def test_missing_answers_are_skipped_not_wrong() -> None:
    questions = [Question("p", ("a", "b"), 0, "a"), Question("p", ("a", "b", "c", "d"), 0, "a")]
    empty = [[(-1.0, 1), (0.0, 0)], [(-1.0, 1), (math.nan, 1), (-2.0, 1), (-3.0, 1)]]
    got = accuracy(questions, empty)
    assert (got.values, got.skipped, got.chance) == ((), 2, None)
    assert got.reason is not None and got.reason.startswith("2 of 2 skipped")
    one = accuracy(questions, [empty[0], [(-1.0, 1)] + [(-2.0, 1)] * 3])
    assert (one.values, one.skipped, one.chance) == ((1.0,), 1, 0.25)  # chance of what was scored
    assert answer_nll(questions, [[(0.0, 0)] * 2, [(-3.0, 2)] * 4]).values == (1.5,)


def test_questions_match_naive(model: Any, tokenizer: Any) -> None:
    prepared = prepare_questions(tokenizer, QUESTIONS)
    assert [len(group) for group in prepared.groups] == [3, 3]
    scored = score(model, prepared, batch_size=8)
    truths = [mean_logprob(model, tokenizer, q.prompt, q.truth) for q in QUESTIONS]
    got = answer_nll(QUESTIONS, scored)
    assert got.values == pytest.approx([-truth for truth in truths], abs=1e-4)
    assert got.weights == (2, 2)
    hits = []
    for question in QUESTIONS:
        means = [mean_logprob(model, tokenizer, question.prompt, c) for c in question.choices]
        hits.append(float(means.index(max(means)) == question.answer))
    right = accuracy(QUESTIONS, scored)
    assert right.values == tuple(hits)
    assert right.chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_fluency(model: Any, tokenizer: Any) -> None:
    scored = [[(-6.0, 3)], [(0.0, 0)], [(-1.0, 1)]]
    for made, unit in ((nll(scored), "nats/token"), (perplexity(scored), "perplexity")):
        assert isinstance(made, Examples)
        assert (made.values, made.weights, made.skipped) == ((2.0, 1.0), (3, 1), 1)
        assert made.unit == unit and "1 of 3" in str(made.reason)


def test_suite_with_everything(model: Any, tokenizer: Any) -> None:
    suite = Suite.build(
        tokenizer,
        split="test",
        max_tokens=16,
        forget_questions=QUESTIONS,
        retain_questions=QUESTIONS[:1],
        forget_texts=TEXTS,  # there are questions, so these stay unused
        perplexity_texts=TEXTS,
    )
    counts: list[int] = []
    scores, examples = suite.measure(model, "patched", counts.append)
    assert sum(counts) == suite.rows == 6 + 3 + 3
    assert {(one.name, one.higher_is) for one in scores} == {
        ("forget_accuracy", "worse"),
        ("retain_accuracy", "better"),
        ("forget_nll", "better"),
        ("retain_nll", "worse"),
        ("perplexity", "worse"),
    }
    assert set(examples) == {one.name for one in scores}
    assert all((one.model, one.split) == ("patched", "test") for one in scores)
    by_name = {one.name: one for one in scores}
    truth = -mean_logprob(model, tokenizer, "a b", "d e")
    assert by_name["retain_nll"].value == pytest.approx(truth, abs=1e-4)
    texts = text_nll(model, tokenizer, TEXTS, max_tokens=16, batch_size=2)
    total, tokens = sum(t for t, _ in texts), sum(n for _, n in texts)
    assert by_name["perplexity"].value == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert (by_name["perplexity"].n, examples["perplexity"].skipped) == (2, 1)


def test_suite_with_gaps(model: Any, tokenizer: Any) -> None:
    suite = Suite.build(tokenizer, split="validation", max_tokens=16, forget_texts=TEXTS)
    by_name = {one.name: one for one in suite.measure(model, "base")[0]}
    assert len(by_name) == 5
    assert by_name["forget_nll"].value is not None and by_name["forget_nll"].n == 2
    for name, reason in (
        ("forget_accuracy", "no forget questions"),
        ("retain_accuracy", "no retain questions"),
        ("retain_nll", "no retain questions and no retain texts"),
        ("perplexity", "no perplexity texts"),
    ):
        assert (by_name[name].value, by_name[name].n) == (None, 0)
        assert by_name[name].reason == reason


@pytest.mark.shared
@needs_shared
def test_stories260k_nats_per_token() -> None:
    path = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    text = (SHARED / "data/tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    ((nats, tokens),) = text_nll(model, tokenizer, [Text(text)], max_tokens=512, batch_size=1)
    assert nats / tokens == pytest.approx(1.76, abs=0.01)


@pytest.mark.shared
@needs_shared
def test_lab7m_knows_tofu_and_the_oracle_does_not() -> None:
    path = SHARED / "data/tofu/forget05_perturbed.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:30]
    questions = [
        Question(
            QUESTION_TEMPLATE.format(question=row["question"]),
            (row["paraphrased_answer"], *row["perturbed_answer"]),
            0,
            row["answer"],
        )
        for row in rows
    ]
    values = {}
    for name in ("lab7m", "lab7m-retrained"):
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
        model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name)
        suite = Suite.build(tokenizer, split="test", max_tokens=256, forget_questions=questions)
        values[name] = {one.name: one.value for one in suite.measure(model, "base")[0]}
    # All 200 rows: accuracy .65 and .33, nats/token .35 and 5.4.
    assert values["lab7m"]["forget_accuracy"] > 0.5
    assert 0.2 < values["lab7m"]["forget_nll"] < 0.45
    assert values["lab7m-retrained"]["forget_accuracy"] < values["lab7m"]["forget_accuracy"]
    assert values["lab7m-retrained"]["forget_nll"] > 4
