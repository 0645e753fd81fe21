"""Scorers: word lists, TF-IDF, classifiers and their labels, the web service, the lot of them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from expunge.data.text import Labelled
from expunge.errors import DataError, ModelError, RecipeError
from expunge.evaluation.scorers import (
    Classifier,
    DetoxifyScorer,
    Perspective,
    Remembered,
    TfidfScorer,
    WordList,
    build_scorers,
)
from expunge.evaluation.scorers import perspective as service
from expunge.evaluation.scorers.detoxify import TENSORS_ONLY

NEUTRAL = "the cup fell and the guest asked for a cloth".split()
OWN = tuple(
    Labelled(text, toxic)
    for word in NEUTRAL
    for text, toxic in ((f"you moron, the {word}", True), (f"look, the {word}", False))
)
BLANK = ["", "  \n", "\u00a0"]


# ---- word lists


def test_words_are_whole_and_casefolded() -> None:
    scorer = WordList(("Moron", "shut up", "Straße"))
    texts = {
        "You MORON!": 1.0,
        "morons": 0.0,
        "oxymoron": 0.0,
        "please shut, up there": 1.0,  # what lies between words does not count
        "shut it": 0.0,
        "STRASSE": 1.0,
        "a fine day": 0.0,
        "...": 0.0,
    }
    assert scorer.score(list(texts)) == list(texts.values())
    assert scorer.score(BLANK) == [None] * 3


def test_word_file(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("moron\n\n  shut up \r\nmoron\n---\n", encoding="utf-8-sig")
    scorer = WordList.from_file(path)
    assert scorer.words == ("moron", "shut up")
    assert "2 words from list.txt" in scorer.about
    path.write_text("\n---\n")
    with pytest.raises(DataError, match="is empty"):
        WordList.from_file(path)
    with pytest.raises(DataError, match="cannot be read"):
        WordList.from_file(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read"):
        WordList.from_file(tmp_path)


def test_words_learned_by_hand() -> None:
    """Of 10 toxic and 10 neutral texts: "you" and "moron" stand in 10 and 0."""
    scorer = WordList.from_labelled(OWN)
    assert scorer.words == ("moron", "you")
    # Odds (10.5 / .5) against (.5 / 10.5): a log ratio of 2 log 21.
    edge = 2 * math.log(21)
    assert WordList.from_labelled(OWN, log_odds=edge - 0.01).words == scorer.words
    for settings in ({"log_odds": edge + 0.01}, {"least": 11}):
        with pytest.raises(DataError, match="No word tells"):
            WordList.from_labelled(OWN, **settings)
    # A word common in neutral texts is left out, whatever its odds.
    own = [*OWN, *[Labelled("you there", False)] * 3, *[Labelled("fine", False)] * 100]
    assert "you" in WordList.from_labelled(own, most=0.05).words
    assert WordList.from_labelled(own, most=0.01).words == ("moron",)


# ---- TF-IDF


def test_tfidf_tells_the_classes_apart() -> None:
    scorer = TfidfScorer.fit(OWN)
    rude, kind, misspelt = scorer.score(["moron at the door", "look at the door", "m0ron, morron"])
    assert rude is not None and kind is not None and misspelt is not None
    assert rude > 0.6 and kind < 0.4 and misspelt > kind
    assert scorer.score(["", rude_text := "you moron", " "]) == [
        None,
        *scorer.score([rude_text]),
        None,
    ]
    assert scorer.score(BLANK) == [None] * 3
    again = TfidfScorer.fit(OWN)
    assert again.score(["moron at the door"]) == [rude]
    assert "(10 toxic, 10 neutral)" in scorer.about


@pytest.mark.parametrize("toxic", [True, False])
def test_a_class_missing(toxic: bool) -> None:
    for fit in (TfidfScorer.fit, WordList.from_labelled):
        with pytest.raises(DataError, match="a class is missing") as caught:
            fit([one for one in OWN if one.toxic is toxic])
        assert "tfidf:FILE" in str(caught.value)


# ---- classifiers


def classifier(
    folder: Path, labels: Sequence[str], *, kind: str = "bert", problem: str | None = None
) -> Path:
    """A random classifier of tiny shape, stored with a tokenizer of a few words."""
    torch.manual_seed(0)
    vocab = ["[PAD]", "[UNK]", *dict.fromkeys([*NEUTRAL, "you", "moron", "look"])]
    sizes: dict[str, Any] = {"vocab_size": len(vocab), "max_position_embeddings": 12}
    names = {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
    if problem:
        names["problem_type"] = problem
    if kind == "distilbert":
        config: Any = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, **sizes)
        factory: Any = DistilBertForSequenceClassification
    else:
        config = BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.5,
            **sizes,
        )
        factory = BertForMaskedLM if kind == "headless" else BertForSequenceClassification
    config.update(names)
    config.label2id = {label: at for at, label in enumerate(labels)}
    factory(config).eval().save_pretrained(folder)
    built = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(vocab)}, unk_token="[UNK]")
    )
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


TEXTS = ["you moron", "look, the cup fell and the guest asked for a cloth", "the cup", "cloth"]


@torch.inference_mode()
def logits(folder: Path, text: str) -> torch.Tensor:
    """Logits of one text alone, [L]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=10)
    return model(input_ids=ids["input_ids"]).logits[0].float()


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_single_label_is_softmax(tmp_path: Path, kind: str) -> None:
    folder = classifier(tmp_path, ["neutral", "toxic"], kind=kind)
    scorer = Classifier.load(str(folder))
    got = scorer.score([*TEXTS, ""])
    expected = [float(logits(folder, text).softmax(0)[1]) for text in TEXTS]
    assert got[:-1] == pytest.approx(expected, abs=1e-6) and got[-1] is None
    assert max(expected) - min(expected) > 1e-3  # a control: the texts do differ
    assert "label toxic" in scorer.about and scorer.name == f"hf:{tmp_path.name}"


def test_rival_toxic_labels_are_added(tmp_path: Path) -> None:
    folder = classifier(tmp_path, ["Hate-Speech", "neither", "offensive"])
    expected = [float(logits(folder, text).softmax(0)[[0, 2]].sum()) for text in TEXTS]
    assert Classifier.load(str(folder)).score(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_multi_label_is_sigmoid(tmp_path: Path) -> None:
    labels = ["obscene", "toxic", "insult"]
    folder = classifier(tmp_path, labels, problem="multi_label_classification")
    scorer = Classifier.load(str(folder))
    expected = [float(logits(folder, text).sigmoid()[1]) for text in TEXTS]
    assert scorer.score(TEXTS) == pytest.approx(expected, abs=1e-6)
    named = Classifier.load(str(folder), label="Insult")
    expected = [float(logits(folder, text).sigmoid()[2]) for text in TEXTS]
    assert named.score(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_one_output_is_sigmoid(tmp_path: Path) -> None:
    folder = classifier(tmp_path, ["toxicity"])
    expected = [float(logits(folder, text).sigmoid()[0]) for text in TEXTS]
    assert Classifier.load(str(folder)).score(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_labels_that_say_nothing(tmp_path: Path) -> None:
    folder = str(classifier(tmp_path, ["LABEL_0", "LABEL_1"]))
    with pytest.raises(DataError) as caught:
        Classifier.load(folder)
    assert "LABEL_0, LABEL_1" in str(caught.value)
    assert f"hf:{folder}#label=NAME" in str(caught.value)
    with pytest.raises(DataError, match="no 'LABEL_7' among them"):
        Classifier.load(folder, label="LABEL_7")
    told = Classifier.load(folder, label="LABEL_1")
    expected = [float(logits(tmp_path, text).softmax(0)[1]) for text in TEXTS]
    assert told.score(TEXTS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [["non-toxic", "nothate"], ["positive", "negative"]])
def test_labels_that_only_sound_alike(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(DataError, match="do not say which one means toxic"):
        Classifier.load(str(classifier(tmp_path, labels)))


def test_outputs_that_cannot_be_read(tmp_path: Path) -> None:
    for at, (labels, problem) in enumerate(
        [(["toxic", "severe_toxic", "threat"], None), (["toxicity"], "regression")]
    ):
        folder = classifier(tmp_path / str(at), labels, problem=problem)
        with pytest.raises(DataError, match="how to read its outputs"):
            Classifier.load(str(folder))


def test_a_classifier_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be opened"):
        Classifier.load(str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"no weights for .*classifier"):
        Classifier.load(str(classifier(tmp_path / "lm", ["neutral", "toxic"], kind="headless")))
    # Pickled weights are not looked at.
    folder = classifier(tmp_path / "old", ["neutral", "toxic"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        Classifier.load(str(folder))


# ---- Detoxify


def test_detoxify_reads_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Detoxify:
        def __init__(self, kind: str, device: str) -> None:
            seen.append(os.environ.get(TENSORS_ONLY))
            assert kind == "original"

        def predict(self, texts: list[str]) -> dict[str, list[float]]:
            return {"toxicity": [len(text) / 100 for text in texts], "insult": [9.0] * len(texts)}

    monkeypatch.delenv(TENSORS_ONLY, raising=False)
    monkeypatch.setitem(sys.modules, "detoxify", SimpleNamespace(Detoxify=Detoxify))
    scorer = DetoxifyScorer.load()
    assert seen == ["1"] and TENSORS_ONLY not in os.environ
    assert scorer.score(["aaaa", " ", *["aa"] * 40]) == [0.04, None, *[0.02] * 40]
    monkeypatch.setitem(sys.modules, "detoxify", SimpleNamespace(Detoxify=lambda *_, **__: 1 / 0))
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        DetoxifyScorer.load()
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(RecipeError, match=r"expunge\[detoxify\]"):
        DetoxifyScorer.load()


# ---- the web service


class Web:
    """A transport, a clock and a sleep in which time passes only by sleeping and asking."""

    def __init__(self, *answers: tuple[int, Any], takes: float = 0.0) -> None:
        self.answers, self.now, self.takes = list(answers), 100.0, takes
        self.asked: list[tuple[float, str]] = []

    def transport(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        assert headers["X-Goog-Api-Key"] == "secret" and "secret" not in url
        given = json.loads(body)
        assert given["doNotStore"] is True and given["requestedAttributes"] == {"TOXICITY": {}}
        self.asked.append((self.now, given["comment"]["text"]))
        self.now += self.takes
        status, answer = self.answers.pop(0)
        return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def scorer(self) -> Perspective:
        return Perspective("secret", transport=self.transport, clock=self.clock, sleep=self.sleep)


def scored(value: float) -> tuple[int, Any]:
    return 200, {"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}}


def refused(kind: str) -> tuple[int, Any]:
    return 400, {"error": {"message": "you moron", "details": [{"errorType": kind}]}}


def test_perspective_asks_once_a_second() -> None:
    web = Web(scored(0.1), scored(0.7), scored(0.2))
    scorer = web.scorer()
    assert scorer.score(["a", "", "b"]) == [0.1, None, 0.7]
    assert scorer.score(["c"]) == [0.2]
    assert web.asked == [(100.0, "a"), (101.0, "b"), (102.0, "c")]
    slow = Web(scored(0.1), scored(0.7), takes=3.0)
    slow.scorer().score(["a", "b"])
    assert [at for at, _ in slow.asked] == [100.0, 103.0]


def test_perspective_tries_again() -> None:
    web = Web((429, b""), (503, b"<html>"), (0, b"TimeoutError"), scored(0.5), scored(0.6))
    assert web.scorer().score(["a", "b"]) == [0.5, 0.6]
    assert [at for at, _ in web.asked] == [100.0, 101.0, 103.0, 107.0, 108.0]
    with pytest.raises(ModelError, match="no connection: TimeoutError"):
        Web(*[(0, b"TimeoutError")] * service.TRIES).scorer().score(["a"])


def test_perspective_texts_that_cannot_be_judged() -> None:
    kinds = ["COMMENT_TOO_LONG", "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"]
    web = Web(*map(refused, kinds), scored(0.3))
    assert web.scorer().score(["a", "b", "c"]) == [None, None, 0.3]


@pytest.mark.parametrize(
    "answer", [refused("API_KEY_INVALID"), (403, b""), (200, b"{}"), (200, b"\xff"), (400, b"[]")]
)
def test_perspective_refusals(answer: tuple[int, Any]) -> None:
    with pytest.raises(ModelError, match=f"HTTP status {answer[0]}") as caught:
        Web(answer).scorer().score(["you moron"])
    assert "moron" not in str(caught.value) and "secret" not in str(caught.value)


def test_perspective_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(service.KEY, raising=False)
    with pytest.raises(RecipeError, match=service.KEY):
        Perspective()


# ---- the lot of them


def test_a_remembered_scorer_judges_each_text_once() -> None:
    class Counting:
        name, about = "counting", "a test"

        def __init__(self) -> None:
            self.calls: list[list[str]] = []

        def score(self, texts: Sequence[str]) -> list[float | None]:
            self.calls.append(list(texts))
            return [len(text) / 10 if text else None for text in texts]

    inner = Counting()
    scorer = Remembered(inner)
    assert scorer.score(["a", "bb", "a", ""]) == [0.1, 0.2, 0.1, None]
    assert scorer.score(["bb", "ccc", ""]) == [0.2, 0.3, None]
    assert scorer.score(["a"]) == [0.1]
    assert inner.calls == [["a", "bb", ""], ["ccc"]]
    assert (scorer.name, scorer.about) == ("counting", "a test")


def test_scorers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    lists = [tmp_path / "list.txt", tmp_path / "a" / "list.txt"]
    for path in lists:
        path.write_text("moron\n")
    labelled = tmp_path / "other.jsonl"
    labelled.write_text(
        "".join(json.dumps({"text": one.text, "label": int(one.toxic)}) + "\n" for one in OWN)
    )
    folder = classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    monkeypatch.setenv(service.KEY, "secret")
    made = build_scorers(
        [
            "words",
            "tfidf",
            f"tfidf:{labelled}",
            *(f"words:{path}" for path in lists),
            f"hf:{folder}#label=LABEL_1",
            "perspective",
        ],
        OWN,
    )
    assert [one.name for one in made] == [
        "words",
        "tfidf",
        "tfidf:other.jsonl",
        "words:list.txt",
        "words:list.txt-2",
        "hf:model",
        "perspective",
    ]
    assert "other.jsonl" in made[2].about and "own training texts" in made[1].about
    judged = [one.score(["you moron", ""]) for one in made[:-1]]
    assert all(value is not None and 0 <= value <= 1 and none is None for value, none in judged)


@pytest.mark.parametrize(
    ("specs", "part"),
    [
        ([], "two scorers"),
        (["words"], "two scorers"),
        (["words", "words"], "all different"),
        (["words", "tfdif"], "did you mean 'tfidf'"),
        (["words", "tfidf:"], "tfidf:FILE"),
        (["words", "hf"], "hf:DIR"),
        (["words", "perspective:key"], "allowed: perspective"),
    ],
)
def test_scorers_named_wrongly(specs: list[str], part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_scorers(specs, OWN)
    assert part in str(caught.value)
