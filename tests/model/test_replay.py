"""Replayed forwards: the same bits as the whole model's, and the layers below do not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import tiny
from expunge.evaluation.likelihood import Scored, score
from expunge.evaluation.prepared import Prepared, Row
from expunge.model.replay import Replay
from expunge.model.structure import find_structure

FIRST = 2
AMPLE = 1 << 30
Scores = list[list[Scored]]


def questions(n: int = 7, *, answers: int = 4) -> Prepared:
    """Prompts of unequal length with answers of unequal length, longer than a sliding window."""
    prompts, rests = tiny.texts(n, seed=1), iter(tiny.texts(n * answers, seed=2))
    groups = [
        tuple(Row((*prompt, *next(rests)[: 1 + at]), len(prompt)) for at in range(answers))
        for prompt in prompts
    ]
    return Prepared(tuple(groups))


def change(modules: Any, by: float = 0.05) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(by * torch.randn(parameter.shape))


class Case:
    """A model, what is measured of it, and a record of what enters one of its layers."""

    def __init__(self, family: str, prepared: Prepared, *, limit: int = AMPLE) -> None:
        self.model = tiny.tiny_model(family)
        self.layers = find_structure(self.model).layers
        self.prepared, self.batch_size = prepared, 8
        self.replay = Replay(self.model, find_structure(self.model), FIRST, limit_bytes=limit)

    def whole(self) -> Scores:
        return score(self.model, self.prepared, batch_size=self.batch_size)

    def replayed(self) -> tuple[Scores, int]:
        """Scores, and in how many forwards the lowest layer's own code has run."""
        with watched(self.layers[0]) as ran:
            scores = self.replay.through(self.whole)
        return scores, len(ran)


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[None]]:
    """Calls of what is deep in a layer, which a replaced forward does not reach."""
    ran: list[None] = []
    deep = [module for module in layer.modules() if not list(module.children())]
    handle = deep[-1].register_forward_hook(lambda *_args: ran.append(None))
    try:
        yield ran
    finally:
        handle.remove()


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("answers", [1, 4])  # one by one, or with a shared prompt
def test_the_same_bits_without_the_layers_below(family: str, answers: int) -> None:
    case = Case(family, questions(answers=answers))
    before = case.whole()
    first, ran = case.replayed()
    assert first == before and ran > 0
    change(case.layers[FIRST:])
    expected = case.whole()
    assert expected != before
    for _ in range(2):
        assert case.replayed() == (expected, 0)


def test_the_record_belongs_to_the_weights_below() -> None:
    case = Case("llama", questions())
    case.replayed()
    change([case.layers[1]])
    expected = case.whole()
    again, ran = case.replayed()
    assert again == expected and ran > 0
    assert case.replayed() == (expected, 0)
    change([case.model.get_input_embeddings()])
    again, ran = case.replayed()
    assert again == case.whole() and ran > 0


def test_positions_that_are_learned_lie_below() -> None:
    case = Case("gpt2", questions())
    case.replayed()
    change([case.model.transformer.wpe])
    expected = case.whole()
    again, ran = case.replayed()
    assert again == expected and ran > 0


def test_what_is_kept_is_counted_and_limited() -> None:
    case = Case("llama", questions(answers=1))
    case.replayed()
    # Padded batches of 8 rows; the last token of a row is never fed.
    longest = max(len(group[0].ids) for group in case.prepared.groups)
    need = 7 * (longest - 1) * tiny.HIDDEN * 4
    assert case.replay.nbytes == need
    for limit, enough in ((need, True), (need - 1, False)):
        case = Case("llama", questions(answers=1), limit=limit)
        expected = case.whole()
        for time in range(3):
            scores, ran = case.replayed()
            assert scores == expected
            assert (ran == 0) == (enough and time > 0)
        assert case.replay.nbytes == (need if enough else 0)


def test_other_batches_than_before_are_computed_in_full() -> None:
    """As after a shortage of memory, which halves the batch."""
    case = Case("llama", questions())
    case.replayed()
    case.batch_size = 4
    expected = case.whole()
    for _ in range(2):
        scores, ran = case.replayed()
        assert scores == expected and ran > 0
    assert case.replay.nbytes == 0


def test_a_question_of_equal_shape_is_another() -> None:
    case = Case("llama", questions())
    before, _ = case.replayed()
    rows = [[Row((3, *row.ids[1:]), row.start) for row in group] for group in questions().groups]
    case.prepared = Prepared(tuple(tuple(group) for group in rows))
    scores, ran = case.replayed()
    assert scores == case.whole() != before and ran > 0


def test_a_cache_knows_what_filled_it() -> None:
    """Two prompts first, then what follows each: equal tokens after unequal prompts differ."""
    case = Case("llama", questions())

    def measure() -> list[torch.Tensor]:
        caches = []
        for first in (5, 6):
            caches.append(DynamicCache(config=case.model.config))
            prompt = torch.tensor([[first, 7, 8]])
            case.model(input_ids=prompt, past_key_values=caches[-1], use_cache=True)
        rest = torch.tensor([[9, 10]])
        return [case.model(input_ids=rest, past_key_values=one).logits for one in caches]

    with torch.inference_mode():
        expected = measure()
        assert not torch.equal(*expected)
        for _ in range(2):
            found = case.replay.through(measure)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_model_is_left_as_it_was() -> None:
    case = Case("llama", questions())
    case.replayed()
    hooks = [len(layer._forward_pre_hooks) for layer in case.layers]

    def broken() -> None:
        case.whole()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.replay.through(broken)
    assert [len(layer._forward_pre_hooks) for layer in case.layers] == hooks
    assert not any("forward" in vars(layer) for layer in case.layers)
    assert case.replayed() == (case.whole(), 0)


def test_half_a_record_is_none() -> None:
    case = Case("llama", questions())

    def broken() -> None:
        case.whole()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.replay.through(broken)
    assert case.replay.nbytes == 0
    assert case.replayed()[1] > 0
    assert case.replayed() == (case.whole(), 0)


def test_a_layer_may_work_in_place() -> None:
    case = Case("llama", questions())
    norm = case.layers[FIRST].input_layernorm

    def double(_module: nn.Module, args: Any) -> None:
        args[0].mul_(2)

    norm.register_forward_pre_hook(double)
    expected = case.whole()
    assert case.replayed()[0] == expected
    for _ in range(2):
        assert case.replayed() == (expected, 0)
