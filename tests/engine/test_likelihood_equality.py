"""Likelihood objectives on the cut model train the same matrices as their textbook forms.

The textbooks run two whole models with their heads: the updated one on forget, chosen and retain
texts, the frozen one on forget and chosen texts. The formulas are written as their sources do.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import textbook
import tiny
from expunge.model.segment import LOGPROBS
from textbook import SEED, WHERE, assert_equal, batch_of

BETA, GAMMA, ALPHA = 0.2, 0.3, 1.5
ALL_LAYERS = tuple(range(tiny.LAYERS))
FORGET, CHOSEN, RETAIN = (
    tiny.texts(n, seed=seed) for n, seed in ((10, 0), (10, 90), (13, 50))
)  # fmt: skip


def text_nats(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π(x) of each text, shape B: the sum over all its tokens but the first."""
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
    labels_BT = ids_BT[:, 1:].masked_fill(~mask_BT[:, 1:], -100)
    nll_BT = functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2), labels_BT, ignore_index=-100, reduction="none"
    )
    return -nll_BT.sum(-1)


def npo(updated: Any, frozen: Any, forget: Sequence[int]) -> Tensor:
    """arXiv:2404.05868, equation 3: −(2/β) E log σ(−β log(π/π0))."""
    batch = batch_of(FORGET, forget)
    with torch.no_grad():
        before_B = text_nats(frozen, *batch)
    ratio_B = text_nats(updated, *batch) - before_B
    return -functional.logsigmoid(-BETA * ratio_B).mean() * 2 / BETA


def dpo(updated: Any, frozen: Any, forget: Sequence[int]) -> Tensor:
    """arXiv:2305.18290, equation 7, with the reference's log-ratio taken off at the end."""
    chosen, rejected = batch_of(CHOSEN, forget), batch_of(FORGET, forget)
    with torch.no_grad():
        reference_B = text_nats(frozen, *chosen) - text_nats(frozen, *rejected)
    policy_B = text_nats(updated, *chosen) - text_nats(updated, *rejected)
    return -functional.logsigmoid(BETA * (policy_B - reference_B)).mean()


def token_nats(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """−log π(x) of each text over its tokens but the first, shape B."""
    return -text_nats(model, ids_BT, mask_BT) / mask_BT[:, 1:].sum(-1)


def graddiff(updated: Any, _frozen: Any, forget: Sequence[int]) -> Tensor:
    """arXiv:2401.06121: the loss of each forget text, with the other sign."""
    return -token_nats(updated, *batch_of(FORGET, forget)).mean()


def simnpo(updated: Any, _frozen: Any, forget: Sequence[int]) -> Tensor:
    """arXiv:2410.07163: −(2/β) E log σ(−(β/|y|) log π − γ)."""
    nats_B = token_nats(updated, *batch_of(FORGET, forget))
    return -functional.logsigmoid(BETA * nats_B - GAMMA).mean() * 2 / BETA


LOSSES: dict[str, Callable[[Any, Any, Sequence[int]], Tensor]] = {
    "npo": npo,
    "dpo": dpo,
    "graddiff": graddiff,
    "simnpo": simnpo,
}
OWN: dict[str, dict[str, float]] = {"graddiff": {}, "simnpo": {"beta": BETA, "gamma": GAMMA}}


def by_the_book(name: str, objective: str, trained: tuple[int, ...]) -> textbook.Textbook:
    def step(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
        ids_BT, mask_BT = batch_of(RETAIN, retain)
        nats_B = text_nats(updated, ids_BT, mask_BT)
        kept = -nats_B.sum() / mask_BT[:, 1:].sum()
        return LOSSES[objective](updated, frozen, forget) + ALPHA * kept

    return textbook.train(name, step, trained)


def bench(name: str, trained: tuple[int, ...], **settings: Any) -> tiny.Bench:
    return tiny.bench(name, trained=trained, captured=(LOGPROBS,), twins=True, **settings)


def settings(objective: str) -> dict[str, Any]:
    return textbook.settings(objective, ALPHA, **OWN.get(objective, {"beta": BETA}))


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("name", WHERE)
def test_same_matrices_as_the_textbook(name: str, objective: str) -> None:
    ours = bench(name, ALL_LAYERS).trainer(**settings(objective)).run()
    assert_equal(ours, by_the_book(name, objective, ALL_LAYERS))
    assert len(ours.weights) == tiny.LAYERS


@pytest.mark.parametrize("objective", LOSSES)
def test_same_matrices_with_accumulated_gradients(objective: str) -> None:
    ours = bench("llama", (1, 2)).trainer(**settings(objective), micro_batch_size=1).run()
    assert_equal(ours, by_the_book("llama", objective, (1, 2)))


@pytest.mark.parametrize("objective", LOSSES)
def test_same_matrices_from_boundaries_in_a_file(objective: str, tmp_path: Path) -> None:
    world = bench("llama", (1, 2), limit_bytes=0, folder=tmp_path)
    assert world.twins is not None and world.twins.storage == world.forget[0].storage == "file"
    ours = world.trainer(**settings(objective)).run()
    assert_equal(ours, by_the_book("llama", objective, (1, 2)))


@pytest.mark.parametrize("objective", LOSSES)
def test_the_comparison_notices_a_wrong_update(objective: str) -> None:
    """A control: another order of batches is far outside the tolerance."""
    ours = bench("llama", (1, 2)).trainer(**{**settings(objective), "seed": SEED + 1}).run()
    book = by_the_book("llama", objective, (1, 2))
    for key, weight in book.weights.items():
        assert (ours.weights[key] - weight).norm() > 0.1 * (weight - book.originals[key]).norm()


def test_the_run_does_what_it_says() -> None:
    """A positive control: forget texts lose likelihood, with dpo against their twins."""

    def nats(objective: str | None, texts: list[list[int]]) -> float:
        world = bench("llama", ALL_LAYERS)
        if objective is not None:
            result = world.trainer(**settings(objective)).run()
            with torch.no_grad():
                for key, weight in result.weights.items():
                    world.segment.weights[key].copy_(weight)
        with torch.no_grad():
            return text_nats(world.model, *tiny.padded(texts)).mean().item()

    for objective in ("npo", "graddiff", "simnpo"):
        assert nats(objective, FORGET) < nats(None, FORGET) - 1
    gap = {one: nats(one, CHOSEN) - nats(one, FORGET) for one in ("dpo", None)}
    assert gap["dpo"] > gap[None] + 1
