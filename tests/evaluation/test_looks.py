"""Looks: the base is (0, 1), numbers agree with sums by hand over the whole model's own forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from expunge import miniature
from expunge.data.text import Pair, Question, Text
from expunge.errors import DataError
from expunge.evaluation.likelihood import score
from expunge.evaluation.looks import LookKind, OutputLook, RepresentationLook
from expunge.model.boundaries import BoundaryStore
from expunge.training.watch import Point

KINDS = ("accuracy", "likelihood")
every_kind = pytest.mark.parametrize("kind", KINDS)


def load(path: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base() -> Any:
    return load(miniature.base_directory())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(miniature.base_directory())


@pytest.fixture(scope="module")
def world() -> miniature.World:
    return miniature.World.generate()


def questions(rows: Sequence[Any], n: int = 24) -> list[Question]:
    found = []
    for row in rows[:n]:
        choices, answer = tuple(row["choices"]), row["answer"]
        prompt = f"Question: {row['question']}\nAnswer:"
        found.append(Question(prompt, choices, answer, choices[answer]))
    return found


@pytest.fixture(scope="module")
def held(world: miniature.World) -> dict[str, Any]:
    """What is held back on both sides."""
    return {
        "forget_questions": questions(world.hazard_questions),
        "retain_questions": questions(world.benign_questions),
        "forget_texts": [Text(text) for text in world.hazard_documents[:6]],
        "retain_texts": [Text(text) for text in world.held_out_benign[:6]],
        "pairs": [],
    }


def look_at(
    model: Any, tokenizer: Any, kind: LookKind, held: Any, items: int = 64, **changes: Any
) -> OutputLook:
    some = {name: values[:items] for name, values in held.items()}
    settings = {"max_tokens": 96, **some, **changes}
    return OutputLook.of(model, tokenizer, kind, **settings)


@contextmanager
def weights(model: Any, state: Any) -> Iterator[None]:
    """Other weights for a while."""
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(before)


def scrambled(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) * tensor.std()
        if tensor.ndim > 1
        else tensor
        for name, tensor in model.state_dict().items()
    }


NO_QUESTIONS: dict[str, Any] = {"forget_questions": [], "retain_questions": []}


# ---- what the whole model says


@every_kind
@pytest.mark.parametrize("changes", [{}, NO_QUESTIONS], ids=["questions", "texts"])
def test_the_base_has_forgotten_nothing_and_kept_all(
    kind: LookKind, changes: Any, base: Any, tokenizer: Any, held: Any
) -> None:
    look = look_at(base, tokenizer, kind, held, **changes)
    assert look() == Point(0.0, 1.0)
    assert look.raw == look.base and len(look.base) == len(look.parts)


@every_kind
@pytest.mark.parametrize("changes", [{}, NO_QUESTIONS], ids=["questions", "texts"])
def test_scrambled_weights_have_lost_both(
    kind: LookKind, changes: Any, base: Any, tokenizer: Any, held: Any
) -> None:
    look = look_at(base, tokenizer, kind, held, **changes)
    with weights(base, scrambled(base)):
        forget, retain = look()
    assert forget > 0.8 and retain < 0.2
    assert look() == Point(0.0, 1.0)


@every_kind
def test_the_oracle_lacks_the_function_and_keeps_the_rest(
    kind: LookKind, base: Any, tokenizer: Any, held: Any
) -> None:
    """A control: the look tells one side from the other."""
    look = look_at(base, tokenizer, kind, held)
    with weights(base, load(miniature.oracle_directory()).state_dict()):
        forget, retain = look()
    assert forget > 0.6 and retain > 0.85


@torch.no_grad()
def mean_nats(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens by one plain forward."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[start - 1 :].mean())


def right_choice(model: Any, tokenizer: Any, question: Question) -> float:
    means = [mean_nats(model, tokenizer, question.prompt, c) for c in question.choices]
    odds = torch.tensor(means).softmax(0)
    return float(odds[question.answer])


def test_the_likelihood_of_the_right_choice_by_hand(base: Any, tokenizer: Any, held: Any) -> None:
    look = look_at(base, tokenizer, "likelihood", held, items=5)
    known = {}
    for side in ("forget_questions", "retain_questions"):
        values = [right_choice(base, tokenizer, q) for q in held[side][:5]]
        known[side] = sum(values) / 5
        assert look.base[side] == pytest.approx(known[side], abs=1e-4)
    with weights(base, load(miniature.oracle_directory()).state_dict()):
        point = look()
        values = [right_choice(base, tokenizer, q) for q in held["forget_questions"][:5]]
    now = sum(values) / 5
    assert look.raw["forget_questions"] == pytest.approx(now, abs=1e-4)
    kept = max(0.0, (now - 0.25) / (known["forget_questions"] - 0.25))
    assert point.forget == pytest.approx(1 - kept, abs=1e-3)


@every_kind
def test_parts_measured_together_are_as_each_alone(
    kind: LookKind, base: Any, tokenizer: Any, world: miniature.World, held: Any
) -> None:
    """Texts of unequal lengths on both sides: none takes another's numbers."""
    texts = [Text(one.text[: 20 + 25 * at]) for at, one in enumerate(held["forget_texts"])]
    pairs = [
        Pair(f"{one.opening} {one.rude}", f"{one.opening} {one.neutral}")
        for one in world.held_out_pairs[:5]
    ]
    given = {**held, "forget_questions": [], "forget_texts": texts}
    changed = load(miniature.oracle_directory()).state_dict()
    for some in ({**given, "pairs": pairs}, held, given):
        look = look_at(base, tokenizer, kind, some)
        assert len(look.parts) >= 3
        with weights(base, changed):
            look()
            for name, part in look.parts.items():
                alone = score(base, part.prepared, batch_size=1)
                assert look.raw[name] == pytest.approx(part.value(alone), abs=1e-5)


def test_a_true_wording_beside_the_choices_is_not_asked(
    base: Any, tokenizer: Any, held: Any
) -> None:
    """It may be the longest, and no measure of a look reads it."""
    asked = [replace(one, truth=f"{one.truth} indeed") for one in held["forget_questions"]]
    look = look_at(base, tokenizer, "likelihood", held, forget_questions=asked)
    assert {len(rows) for rows in look.parts["forget_questions"].prepared.groups} == {4}
    assert look.base == look_at(base, tokenizer, "likelihood", held).base


def planted(look: OutputLook, base: dict[str, float], now: dict[str, float]) -> Point:
    """The point where the parts measure these numbers."""
    look.base = base
    look._measure = lambda: now  # type: ignore[method-assign]
    return look()


def test_the_point_by_hand(base: Any, tokenizer: Any, held: Any) -> None:
    """Questions from chance ¼ to the base's; texts exp(−Δ); the worst retained part counts."""
    names = ("forget_questions", "retain_questions", "retain_texts")
    look = look_at(base, tokenizer, "accuracy", held)
    assert tuple(look.parts) == names

    def point(*now: float) -> Point:
        return planted(
            look,
            dict(zip(names, (0.85, 0.75, 2.0), strict=True)),
            dict(zip(names, now, strict=True)),
        )

    assert point(0.55, 0.65, 2.0) == pytest.approx((0.5, 0.8))
    assert point(0.55, 0.75, 2.5) == pytest.approx((0.5, math.exp(-0.5)))
    # Better than the base is as the base, worse than guessing as guessing.
    assert point(0.95, 0.95, 1.0) == (0.0, 1.0)
    assert point(0.05, 0.75, 2.0) == (1.0, 1.0)
    # A model that says nothing finite has lost all.
    assert point(math.nan, math.nan, math.inf) == (1.0, 0.0)
    assert point(0.85, 0.75, math.nan) == (0.0, 0.0)


def test_texts_are_measured_where_nothing_is_asked(base: Any, tokenizer: Any, held: Any) -> None:
    look = look_at(base, tokenizer, "accuracy", held, **NO_QUESTIONS)
    assert set(look.parts) == {"forget_texts", "retain_texts"}
    text = held["retain_texts"][0].text
    alone = look_at(base, tokenizer, "accuracy", {**held, **NO_QUESTIONS}, items=1)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :96]
    with torch.no_grad():
        expected = float(base(ids, labels=ids).loss)
    assert alone.base["retain_texts"] == pytest.approx(expected, abs=1e-4)


def test_of_pairs_the_wordings_after_the_opening_count(
    base: Any, tokenizer: Any, world: miniature.World, held: Any
) -> None:
    pairs = [
        Pair(f"{one.opening} {one.rude}", f"{one.opening} {one.neutral}")
        for one in world.held_out_pairs[:3]
    ]
    assert all(pair.opening.strip() for pair in pairs)
    look = look_at(base, tokenizer, "likelihood", {**held, **NO_QUESTIONS}, pairs=pairs)
    assert set(look.parts) == {"forget_texts", "retain_texts", "retain_neutral"}
    groups = [look.parts[name].prepared.groups for name in ("forget_texts", "retain_neutral")]
    for pair, *rows in zip(pairs, *groups, strict=True):
        opening = len(tokenizer(pair.opening)["input_ids"])
        assert all(1 < row.start <= opening for ((row),) in rows)


def test_questions_that_do_not_fit_are_left_out(base: Any, tokenizer: Any, held: Any) -> None:
    """Missing is not likely: an unscored choice would count as one of probability 1."""
    long = replace(held["forget_questions"][0], choices=("x " * 200, "a", "b", "c"), answer=1)
    few = held["forget_questions"][:3]
    with_it = look_at(base, tokenizer, "likelihood", held, forget_questions=[long, *few])
    without = look_at(base, tokenizer, "likelihood", held, forget_questions=few)
    assert with_it.base == pytest.approx(without.base, abs=1e-5)
    assert with_it.parts["forget_questions"].chance == 0.25


@every_kind
def test_a_model_that_is_broken_has_lost_both(
    kind: LookKind, base: Any, tokenizer: Any, held: Any
) -> None:
    look = look_at(base, tokenizer, kind, held)
    broken = {name: tensor * math.nan for name, tensor in base.state_dict().items()}
    with weights(base, broken):
        assert look() == Point(1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_questions": [], "forget_texts": []}, "nothing to look at on the forget side"),
        ({"retain_questions": [], "retain_texts": []}, "nothing to look at on the retain side"),
        ({"max_tokens": 5}, "nothing to look at on the forget side"),
    ],
)
def test_nothing_on_a_side_is_an_error(
    changes: Any, message: str, base: Any, tokenizer: Any, held: Any
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        look_at(base, tokenizer, "accuracy", held, **changes)
    assert "reward=representation" in caught.value.fix


@every_kind
def test_a_base_that_guesses_is_an_error(
    kind: LookKind, base: Any, tokenizer: Any, held: Any
) -> None:
    """Three of four questions have another's answer for theirs: one in four is right."""
    guessed = [
        replace(question, answer=(question.answer + turn) % 4)
        for turn, question in enumerate(held["forget_questions"][:4])
    ]
    with pytest.raises(DataError, match="no better than by guessing") as caught:
        look_at(base, tokenizer, kind, held, forget_questions=guessed)
    assert "forget questions: 0.2" in caught.value.got
    assert "chance 0.250" in caught.value.got and "0.05 above chance" in caught.value.allowed
    other = {"accuracy": "representation", "likelihood": "accuracy"}[kind]
    assert f"reward={other}" in caught.value.fix and kind in caught.value.what


# ---- activations alone


@pytest.fixture
def bench() -> tiny.Bench:
    return tiny.bench(trained=(1, 2), captured=(1, 2))


def turned(bench: tiny.Bench) -> RepresentationLook:
    forget = BoundaryStore(bench.segment, tiny.texts(7, seed=3), reference=True)
    retain = BoundaryStore(bench.segment, tiny.texts(9, seed=4), reference=True)
    forget.compute()
    retain.compute()
    return RepresentationLook(bench.segment, forget, retain)


@torch.no_grad()
def states(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Activations after layers 1 and 2, first token left out, LTD, by the whole model."""
    found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([found[2][0, 1:], found[3][0, 1:]])


def change_(bench: tiny.Bench, by: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in bench.segment.weights.values():
            weight.add_(by * torch.randn(weight.shape, generator=generator))


def test_activations_of_the_base_have_not_turned(bench: tiny.Bench) -> None:
    assert turned(bench)() == pytest.approx((0.0, 1.0), abs=1e-5)


def test_the_angle_agrees_with_the_whole_models(bench: tiny.Bench) -> None:
    look, texts = turned(bench), (tiny.texts(7, seed=3), tiny.texts(9, seed=4))
    before = [[states(bench.model, ids) for ids in side] for side in texts]
    change_(bench, 0.2)
    after = [[states(bench.model, ids) for ids in side] for side in texts]
    forget, retain = (
        # A mean over tokens of all texts, not over texts.
        float(
            torch.cosine_similarity(torch.cat(one, 1), torch.cat(other, 1), dim=-1).mean(1).mean()
        )
        for one, other in zip(before, after, strict=True)
    )
    assert 0.1 < forget < 0.95  # a control: there is something to see
    assert look() == pytest.approx((1 - forget, retain), abs=1e-5)
    assert look.raw == pytest.approx({"forget_cos": forget, "retain_cos": retain}, abs=1e-5)


def test_no_finite_activation_is_nothing_kept(bench: tiny.Bench) -> None:
    look = turned(bench)
    change_(bench, math.inf)
    assert look() == Point(1.0, 0.0)


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_no_text_on_a_side_is_an_error(bench: tiny.Bench, side: str) -> None:
    stores = {"forget": bench.forget[0], "retain": bench.retain}
    stores[side] = BoundaryStore(bench.segment, [], reference=True)
    with pytest.raises(DataError, match=f"nothing to look at on the {side} side"):
        RepresentationLook(bench.segment, **stores)
