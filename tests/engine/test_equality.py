"""The central claim: the engine trains the same matrices as a textbook implementation.

The textbook below keeps two whole models and runs three whole forwards a step, as the public RMU
code does: the updated model on forget texts, the updated and the frozen model on retain texts.
It shares nothing with the engine but the texts, the order of batches and the direction u.

Shapes: B batch, T tokens, D hidden size.
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
from expunge.objectives.targets import Targets
from textbook import SEED, WHERE, assert_equal, batch_of, hidden

LAYER = 2
COEFFICIENT, ALPHA = 6.5, 3.0

# (updated forget BTD, updated retain BTD, frozen retain BTD, both masks BT, u_D) -> loss
TextbookLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def rmu(h: Tensor, kept: Tensor, frozen: Tensor, m: Tensor, n: Tensor, u_D: Tensor) -> Tensor:
    forget = functional.mse_loss(h[m], (COEFFICIENT * u_D).expand_as(h[m]))
    return forget + ALPHA * functional.mse_loss(kept[n], frozen[n])


def cosine_rmu(
    h: Tensor, kept: Tensor, frozen: Tensor, m: Tensor, n: Tensor, u_D: Tensor
) -> Tensor:
    def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
        return (a_ND * b_ND).sum(-1) / (a_ND.norm(dim=-1) * b_ND.norm(dim=-1))

    forget = (1 - cosine(h[m], u_D.expand_as(h[m]))).mean()
    return forget + ALPHA * (1 - cosine(kept[n], frozen[n])).mean()


LOSSES: dict[str, TextbookLoss] = {"rmu": rmu, "cosine-rmu": cosine_rmu}


def trained_by_the_book(
    name: str, loss_of: TextbookLoss, trained: tuple[int, ...], *, schedule: str = "linear"
) -> textbook.Textbook:
    """The run on two whole models."""
    forget_texts, retain_texts = tiny.texts(10, seed=0), tiny.texts(13, seed=50)
    u_D = Targets("positive", SEED, tiny.HIDDEN).at(0, torch.zeros(1, 1, dtype=torch.long))

    def step(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
        forget_ids, forget_mask = batch_of(forget_texts, forget)
        retain_ids, retain_mask = batch_of(retain_texts, retain)
        counted = forget_mask.clone()
        counted[:, 0] = False  # the first token is left out of the forget term
        with torch.no_grad():
            (frozen_BTD,) = hidden(name, frozen, retain_ids, retain_mask, [LAYER])
        (forget_BTD,) = hidden(name, updated, forget_ids, forget_mask, [LAYER])
        (retain_BTD,) = hidden(name, updated, retain_ids, retain_mask, [LAYER])
        return loss_of(forget_BTD, retain_BTD, frozen_BTD, counted, retain_mask, u_D)

    return textbook.train(name, step, trained, schedule=schedule)


def settings(objective: str) -> dict[str, Any]:
    own = {"coefficient": COEFFICIENT} if objective == "rmu" else {}
    return textbook.settings(objective, ALPHA, **own)


def assert_equal_to_textbook(
    bench: tiny.Bench,
    name: str,
    objective: str,
    trained: tuple[int, ...],
    *,
    schedule: str = "linear",
    **more: Any,
) -> None:
    ours = bench.trainer(**settings(objective), lr_schedule=schedule, **more).run()
    book = trained_by_the_book(name, LOSSES[objective], trained, schedule=schedule)
    assert len(book.weights) == len(trained)
    assert_equal(ours, book)


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("name", WHERE)
def test_same_matrices_as_the_textbook(name: str, objective: str) -> None:
    trained = (0, 1, 2)
    bench = tiny.bench(name, trained=trained)
    # The comparison covers padding: some batch holds texts of unequal length.
    assert len({len(ids) for ids in bench.retain.texts}) > 3
    assert_equal_to_textbook(bench, name, objective, trained)


def test_same_matrices_at_a_constant_rate() -> None:
    bench = tiny.bench("llama", trained=(1, 2))
    assert_equal_to_textbook(bench, "llama", "rmu", (1, 2), schedule="constant")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_same_matrices_with_accumulated_gradients(micro_batch_size: int) -> None:
    bench = tiny.bench("llama", trained=(1, 2))
    assert_equal_to_textbook(bench, "llama", "rmu", (1, 2), micro_batch_size=micro_batch_size)


def test_same_matrices_from_boundaries_in_a_file(tmp_path: Path) -> None:
    bench = tiny.bench("llama", trained=(1, 2), limit_bytes=0, folder=tmp_path)
    assert bench.retain.storage == "file"
    assert_equal_to_textbook(bench, "llama", "cosine-rmu", (1, 2))


def test_the_comparison_notices_a_wrong_update() -> None:
    """A control: another seed, hence another u and order, is far outside the tolerance."""
    bench = tiny.bench("llama", trained=(1, 2))
    ours = bench.trainer(**{**settings("rmu"), "seed": SEED + 1}).run()
    book = trained_by_the_book("llama", rmu, (1, 2))
    for key, weight in book.weights.items():
        assert (ours.weights[key] - weight).norm() > 0.1 * (weight - book.originals[key]).norm()
