"""Toxicity by hand: rates, fluency, KL, the summary; and the miniature as a positive control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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

from expunge.data.text import Labelled, Pair, Text
from expunge.evaluation import detoxification, divergence
from expunge.evaluation.detoxification import Ingredients
from expunge.evaluation.generation import Continuation, Sampling
from expunge.evaluation.prepared import prepare_texts
from expunge.evaluation.scorers import TfidfScorer, WordList
from expunge.evaluation.toxicity import Collected, ToxicitySuite
from expunge.miniature import RUDE_WORDS, base_directory, check_data, oracle_directory
from expunge.records import Score

LETTERS = [*"abcdefghijklmnop"]
PAIRS = (Pair("a b c d", "a B e f g"), Pair("h i", "j k"), Pair("l m", "l m n"))
NEUTRAL = (Text("a b c d e f"), Text("g h"), Text("i j k l m n o p a b"), Text(""))


class By:
    """A scorer that looks its judgement up; None for a blank text."""

    about = "a test"

    def __init__(self, name: str, **scores: float) -> None:
        self.name, self.scores = name, scores

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [self.scores.get(text.strip(), 0.0) if text.strip() else None for text in texts]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: at for at, word in enumerate(["<s>", "</s>", "<unk>", *LETTERS])}
    built = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build(seed: int, size: int = 19) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base() -> Any:
    return build(0)


@pytest.fixture(scope="module")
def other() -> Any:
    return build(1)


def suite(tokenizer: Any, **given: Any) -> ToxicitySuite:
    settings: dict[str, Any] = {
        "split": "test",
        "prompts": {"openings": [Text("a b"), Text("c")], "web": [Text("d e f g")]},
        "pairs": PAIRS,
        "neutral_texts": NEUTRAL,
        "scorers": [By("one"), By("two", a=0.5)],
        "sampling": Sampling(samples=2, new_tokens=4),
        "max_tokens": 16,
    }
    return ToxicitySuite.build(tokenizer, **{**settings, **given})


def by_key(scores: Sequence[Score]) -> dict[tuple[str | None, ...], Score]:
    found = {(one.name, one.prompts, one.scorer): one for one in scores}
    assert len(found) == len(scores)
    return found


@torch.inference_mode()
def logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of one sequence by a full forward: [T, V], float64."""
    return model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)


def spoken(*texts: str) -> tuple[Continuation, ...]:
    """Continuations of "<s> a" by letters; all but the empty one end with the end token."""
    return tuple(
        Continuation((0, 3), (*(3 + LETTERS.index(word) for word in text.split()), 1), text)
        for text in texts
    )


def test_scores_by_hand(tokenizer: Any, base: Any) -> None:
    """Three prompts: one with an empty continuation, one with nothing else."""
    made = suite(
        tokenizer,
        prompts={"openings": [Text("a")] * 3},
        scorers=[By("one", b=0.9, c=0.5), By("two", b=0.2)],
        sampling=Sampling(samples=3),
    )
    continued = (spoken("b", "c", "d d d"), spoken("b", "", "e f e f"), spoken("", "", ""))
    collected = Collected({"openings": continued}, [[(-6.0, 3)], [(0.0, 0)], [(-1.0, 1)]], ())
    counts: list[int] = []
    scores, examples = made.judge(collected, base, collected, "base", counts.append)
    found = by_key(scores)
    assert sum(counts) == made.judge_rows == 9

    for scorer, rates, most, means in (
        ("one", (2 / 3, 1 / 2), (0.9, 0.9), (1.4 / 3, 0.45)),
        ("two", (0, 0), (0.2, 0.2), (0.2 / 3, 0.1)),
    ):
        names = ("toxicity_rate", rates), ("expected_max_toxicity", most), ("toxicity_mean", means)
        for name, values in names:
            score = found[name, "openings", scorer]
            own = examples[f"{name}/openings/{scorer}"]
            assert own.values == pytest.approx(values)
            assert (own.skipped, score.n, score.unit, score.higher_is) == (
                1,
                2,
                "fraction",
                "worse",
            )
            assert "1 of 3 skipped" in str(own.reason)
            assert "4 of 9 continuations were empty" in str(own.reason)
            assert score.value == pytest.approx(sum(values) / 2)

    assert examples["empty_rate/openings"].values == pytest.approx((0, 1 / 3, 1))
    # "d d d" has the pair d d twice; "e f e f" has three pairs, one of them twice.
    assert examples["distinct_2/openings"].values == pytest.approx((1 / 2, 2 / 3))
    assert found["distinct_2", "openings", None].higher_is == "better"

    nats = [
        [
            -sum(
                float(logprobs(base, [0, 3, *one.ids])[1 + at, token])
                for at, token in enumerate(one.ids)
            )
            for one in own
            if not one.empty
        ]
        for own in continued[:2]
    ]
    tokens = [2 + 2 + 4, 2 + 5]
    fluency = examples["fluency/openings"]
    assert fluency.values == pytest.approx(
        [sum(n) / t for n, t in zip(nats, tokens, strict=True)], abs=1e-4
    )
    assert fluency.weights == tuple(tokens)
    score = found["fluency", "openings", None]
    assert score.value == pytest.approx(math.exp(sum(map(sum, nats)) / 15), rel=1e-4)
    assert (score.unit, score.model, score.split) == ("perplexity", "base", "test")

    neutral = found["neutral_nll", None, None]
    assert (neutral.value, neutral.n, examples["neutral_nll"].skipped) == (7 / 4, 2, 1)


def test_only_empty_continuations_are_unscored(tokenizer: Any, base: Any) -> None:
    made = suite(tokenizer, prompts={"openings": [Text("a")] * 2}, sampling=Sampling(2))
    silent = Collected({"openings": (spoken("", ""), spoken("", " "))}, [], ())
    found = by_key(made.judge(silent, base, silent, "patched")[0])
    for (name, prompts, _), score in found.items():
        if prompts is None or name == "empty_rate":
            continue
        if name != "detoxification_content":
            assert (score.value, score.ci_low) == (None, None) and score.reason, name
    assert found["empty_rate", "openings", None].value == 1
    assert "empty" in str(found["toxicity_rate", "openings", "one"].reason)


def test_collect_and_judge(tokenizer: Any, base: Any, other: Any) -> None:
    made, counts = suite(tokenizer), []
    of_base = made.collect(base, counts.append)
    assert sum(counts) == made.rows == 3 * 2 + 3 + 4
    assert {name: len(own) for name, own in of_base.continued.items()} == {"openings": 2, "web": 1}
    # "a b" is the shared opening of the first pair, "l m" of the third; the second has none.
    ids = tokenizer("a B e f g")["input_ids"]
    expected = sum(float(logprobs(base, ids)[at - 1, ids[at]]) for at in (3, 4, 5))
    assert of_base.neutral[0] == [(pytest.approx(expected, abs=1e-4), 3)]
    assert of_base.neutral[1] == [(0.0, 0)] and of_base.neutral[2][0][1] == 1

    of_other = made.collect(other)
    scores, examples = made.judge(of_other, base, of_base, "oracle")
    found = by_key(scores)
    assert {(name, prompts) for name, prompts, _ in found} == {
        *(
            (name, prompts)
            for prompts in ("openings", "web")
            for name in (
                "fluency",
                "distinct_2",
                "empty_rate",
                "toxicity_rate",
                "expected_max_toxicity",
                "toxicity_mean",
            )
        ),
        ("neutral_nll", None),
        ("kl_to_base", None),
        *(
            (f"detoxification{part}", "openings")
            for part in (
                "",
                "_removal",
                "_fluency",
                "_content",
            )
        ),
    }
    assert all((one.model, one.split) == ("oracle", "test") for one in scores)
    assert len(examples) == 2 * (3 + 2 * 3) + 2
    # No text is toxic, to the scorer "one", of the base either: there is nothing to remove.
    removal = found["detoxification_removal", "openings", None]
    assert removal.value is None and "0 by one" in str(removal.reason)
    assert found["detoxification", "openings", None].reason == "unscored: removal"
    # Batches change nothing.
    narrow = replace(made, sampling=replace(made.sampling, batch_size=1), text_batch=1, row_batch=1)
    again, _ = narrow.judge(narrow.collect(other), base, narrow.collect(base), "oracle")
    for one, two in zip(scores, again, strict=True):
        assert (one.name, one.value) == (two.name, pytest.approx(two.value, abs=1e-4))


def test_gaps(tokenizer: Any, base: Any) -> None:
    made = suite(tokenizer, prompts={}, pairs=(), neutral_texts=())
    collected = made.collect(base)
    found = by_key(made.judge(collected, base, collected, "base")[0])
    assert {key[0]: one.reason for key, one in found.items()} == {
        "neutral_nll": "no pairs",
        "kl_to_base": "no neutral texts",
        "detoxification_removal": "no continuation could be scored",
        "detoxification_fluency": "no continuation, or no neutral wording, could be scored",
        "detoxification_content": "no neutral wording could be scored",
        "detoxification": "unscored: removal, fluency, content",
    }
    assert all((one.value, one.n) == (None, 0) for one in found.values())


# ---- KL


def test_divergence_by_hand(tokenizer: Any, base: Any, other: Any) -> None:
    prepared = prepare_texts(tokenizer, NEUTRAL, max_tokens=16)
    of = {
        (name, size): divergence.next_logprobs(model, prepared, batch_size=size)
        for name, model in (("base", base), ("other", other))
        for size in (1, 3)
    }
    expected: list[Any] = []
    for text in NEUTRAL[:3]:
        ids = tokenizer(text.text)["input_ids"]
        p_TV, q_TV = logprobs(base, ids)[:-1], logprobs(other, ids)[:-1]
        expected.append((float((p_TV.exp() * (p_TV - q_TV)).sum(1).mean()), len(ids) - 1))
    for size in (1, 3):
        got = divergence.divergence(of["base", size], of["other", size])
        assert got[3] is None
        for (value, weight), (known, count) in zip(got[:3], expected, strict=True):
            assert (value, weight) == (pytest.approx(known, rel=2e-3), count)
    itself = divergence.divergence(of["base", 1], of["base", 1])
    assert [one and one[0] for one in itself] == [0.0, 0.0, 0.0, None]
    assert expected[0][0] > 0.1  # a control


def test_divergence_between_other_vocabularies(tokenizer: Any, base: Any) -> None:
    made = suite(tokenizer)
    of_base = made.collect(base)
    wider = replace(made.collect(build(0, size=24)), continued=of_base.continued)
    scores, _ = made.judge(wider, base, of_base, "oracle")
    kl = by_key(scores)["kl_to_base", None, None]
    assert kl.value is None and "another vocabulary" in str(kl.reason)


def test_positions_are_spread_within_the_limit() -> None:
    spans = [(1, 11), (1, 1), (5, 7), (1, 3)]
    assert [len(own) for own in divergence._kept(spans, 100)] == [10, 0, 2, 2]
    assert divergence._kept(spans, 100)[2] == (4, 5)
    assert divergence._kept(spans, 9) == [(0, 3, 6), (), (4, 5), (0, 1)]
    assert divergence._kept(spans, 2) == [(0,), (), (4,), ()]
    assert divergence._kept([], 5) == []


# ---- the summary


def ones(*values: float | None) -> list[tuple[float, float] | None]:
    return [None if value is None else (value, 1.0) for value in values]


GIVEN = Ingredients(
    rates={"a": ones(0.0, 0.2), "b": ones(0.1, 0.1)},
    base_rates={"a": ones(0.5, 0.5), "b": ones(0.2, 0.6)},
    fluency=[(3.0, 10.0), (2.0, 30.0)],
    neutral=ones(2.5, 1.9),
    base_neutral=ones(2.0, 1.8),
)


def summed(given: Ingredients) -> dict[str, Score]:
    scores = detoxification.summary(given, model="patched", split="test", prompts="openings")
    return {one.name.removeprefix("detoxification_"): one for one in scores}


def test_summary_by_hand() -> None:
    """Scorer a keeps .1 of .5, scorer b .1 of .4: the worse is b, .25."""
    found = summed(GIVEN)
    parts = {
        "removal": 0.75,
        "fluency": math.exp(1.9 - 2.25),
        "content": math.exp(1.9 - 2.2),
    }
    for name, value in parts.items():
        assert found[name].value == pytest.approx(value), name
    mean = 3 / sum(1 / value for value in parts.values())
    assert found["detoxification"].value == pytest.approx(mean)
    for one in found.values():
        assert one.ci_low is not None and one.ci_high is not None and one.value is not None
        assert 0 <= one.ci_low <= one.value <= one.ci_high <= 1
        assert (one.n, one.higher_is, one.prompts, one.unit) == (
            2,
            "better",
            "openings",
            "fraction",
        )


def test_summary_at_its_ends() -> None:
    worse = replace(GIVEN, rates=GIVEN.base_rates | {"a": ones(0.9, 0.9)})
    assert summed(worse)["removal"].value == 0 == summed(worse)["detoxification"].value
    better = Ingredients(
        rates={"a": ones(0, 0)},
        base_rates={"a": ones(1, 0.2)},
        fluency=ones(1, 1),
        neutral=ones(1, 2),
        base_neutral=ones(2, 2),
    )
    assert {one.value for one in summed(better).values()} == {1.0}


def test_base_and_model_are_resampled_alike() -> None:
    """Prompts differ widely, but the model halves each: the interval of removal has no width."""
    rates = ones(*np.linspace(0.1, 1, 20))
    halved = [one and (one[0] / 2, 1.0) for one in rates]
    removal = summed(replace(GIVEN, rates={"a": halved}, base_rates={"a": rates}))["removal"]
    assert removal.value == pytest.approx(0.5)
    assert (removal.ci_low, removal.ci_high) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rates": {"a": ones(None, None)}}, "removal"),
        ({"base_rates": {"a": ones(0, 0), "b": ones(1, 1)}}, "removal"),
        ({"fluency": ones(None, None)}, "fluency"),
        ({"neutral": ones(None)}, "content"),
    ],
)
def test_summary_without_a_part(change: dict[str, Any], name: str) -> None:
    found = summed(replace(GIVEN, **change))
    assert found[name].value is None and found[name].reason
    whole = found["detoxification"]
    assert (whole.value, whole.reason) == (None, f"unscored: {name}")
    others = set(found) - {name, "detoxification"}
    assert all(found[one].value is not None for one in others)


# ---- a positive control


def test_the_miniature_is_rude_and_its_oracle_is_not() -> None:
    world = check_data()
    scenes = world.held_out_pairs[:60]
    labelled = [
        Labelled(pair.opening + text, toxic)
        for pair in world.pairs[:400]
        for text, toxic in ((pair.rude, True), (pair.neutral, False))
    ]
    tokenizer = AutoTokenizer.from_pretrained(base_directory())
    base, oracle = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (base_directory(), oracle_directory())
    )
    made = ToxicitySuite.build(
        tokenizer,
        split="test",
        prompts={"openings": [Text(pair.opening) for pair in scenes]},
        pairs=[Pair(one.opening + one.rude, one.opening + one.neutral) for one in scenes],
        neutral_texts=[Text(one.opening + one.neutral) for one in scenes],
        scorers=[WordList(RUDE_WORDS), TfidfScorer.fit(labelled)],
        sampling=Sampling(samples=3, new_tokens=24),
        max_tokens=128,
    )
    of_base, of_oracle = made.collect(base), made.collect(oracle)
    rude = by_key(made.judge(of_base, base, of_base, "base")[0])
    polite = by_key(made.judge(of_oracle, base, of_base, "oracle")[0])
    for scorer in ("words", "tfidf"):
        before = rude["toxicity_rate", "openings", scorer].value
        assert before is not None and 0.35 < before < 0.6
        assert polite["toxicity_rate", "openings", scorer].value == 0
    assert (
        rude["kl_to_base", None, None].value == 0 == rude["detoxification", "openings", None].value
    )
    removal = polite["detoxification_removal", "openings", None]
    assert removal.value == 1
    whole = polite["detoxification", "openings", None]
    assert whole.value is not None and whole.value > 0.85
    assert polite["neutral_nll", None, None].value < rude["neutral_nll", None, None].value
