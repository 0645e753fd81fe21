"""A probe objective over several captured layers trains the textbook's matrices.

Shapes: B batch, T tokens, D hidden size, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import textbook
import tiny
from expunge.objectives import Direction
from textbook import WHERE, assert_equal, batch_of, hidden

ALPHA, CONTENT, MARGIN = 2.0, 0.5, 0.25
READ = (1, 2, 3)
DIRECTIONS = tiny.directions(READ)


def forget_term(h_ND: Tensor, before_ND: Tensor, w: Direction) -> Tensor:
    """The formula under test, for one layer."""
    place_N = (h_ND @ w.unit_D - w.neutral) / (w.toxic - w.neutral)
    away_DD = torch.eye(tiny.HIDDEN) - torch.outer(w.unit_D, w.unit_D)
    lost_N = ((h_ND - before_ND) @ away_DD).norm(dim=-1) ** 2 / before_ND.norm(dim=-1) ** 2
    return ((place_N + MARGIN) ** 2).mean() + CONTENT * lost_N.mean()


def retain_term(h_ND: Tensor, before_ND: Tensor) -> Tensor:
    return ((h_ND - before_ND).norm(dim=-1) ** 2 / before_ND.norm(dim=-1) ** 2).mean()


def by_the_book(name: str, trained: tuple[int, ...]) -> textbook.Textbook:
    forget_texts, retain_texts = tiny.texts(10, seed=0), tiny.texts(13, seed=50)

    def step(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
        total = torch.zeros(())
        for texts, numbers, weight in ((forget_texts, forget, 1.0), (retain_texts, retain, ALPHA)):
            ids_BT, mask_BT = batch_of(texts, numbers)
            counted_BT = mask_BT.clone()
            counted_BT[:, 0] = texts is retain_texts
            with torch.no_grad():
                before = hidden(name, frozen, ids_BT, mask_BT, READ)
            now = hidden(name, updated, ids_BT, mask_BT, READ)
            for w, h_BTD, h0_BTD in zip(DIRECTIONS.values(), now, before, strict=True):
                h_ND, h0_ND = h_BTD[counted_BT], h0_BTD[counted_BT]
                term = (
                    retain_term(h_ND, h0_ND)
                    if texts is retain_texts
                    else forget_term(h_ND, h0_ND, w)
                )
                total = total + weight * w.weight * term / len(READ)
        return total

    return textbook.train(name, step, trained)


@pytest.mark.parametrize(
    ("name", "trained", "micro_batch_size"),
    [*((name, (0, 1, 2, 3), 0) for name in WHERE), ("llama", (1, 3), 1)],
)
def test_same_matrices_as_the_textbook(
    name: str, trained: tuple[int, ...], micro_batch_size: int
) -> None:
    bench = tiny.bench(name, trained=trained, captured=READ)
    settings = textbook.settings("multi-layer-probe", ALPHA, margin=MARGIN, content_weight=CONTENT)
    ours = bench.trainer(**settings, micro_batch_size=micro_batch_size).run()
    assert_equal(ours, by_the_book(name, trained))
