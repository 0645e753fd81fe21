"""A probe objective over several captured layers trains the textbook's matrices.

With twins, the textbook also runs two whole heads on the neutral wordings.

Shapes: B batch, T tokens, D hidden size, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import textbook
import tiny
from expunge.model.segment import LOGPROBS, Segment
from expunge.objectives import Direction
from textbook import SEED, WHERE, assert_equal, batch_of, hidden

ALPHA, CONTENT, MARGIN = 2.0, 0.5, 0.25
READ = (1, 2, 3)
DIRECTIONS = tiny.directions(READ)
FORGET, TWINS, RETAIN = (
    tiny.texts(n, seed=seed) for n, seed in ((10, 0), (10, 90), (13, 50))
)  # fmt: skip


def forget_term(h_ND: Tensor, before_ND: Tensor, w: Direction) -> Tensor:
    """The formula under test, for one layer; d is the difference of the class means."""
    d_D = w.move_D * (w.toxic - w.neutral)
    excess_N = (before_ND @ w.unit_D - w.neutral + MARGIN * w.spread).clamp(min=0)
    goal_ND = before_ND - torch.outer(excess_N, d_D / (w.unit_D @ d_D))
    return ((h_ND - goal_ND).norm(dim=-1) ** 2).mean() / d_D.norm() ** 2


def retain_term(h_ND: Tensor, before_ND: Tensor, w: Direction) -> Tensor:
    d_D = w.move_D * (w.toxic - w.neutral)
    return ((h_ND - before_ND).norm(dim=-1) ** 2).mean() / d_D.norm() ** 2


def content_term(updated: Any, numbers: Sequence[int]) -> Tensor:
    """Nats/token of the other wordings, by the library's own loss."""
    ids_BT, mask_BT = batch_of(TWINS, numbers)
    logits_BTV = updated(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
    labels_BT = ids_BT[:, 1:].masked_fill(~mask_BT[:, 1:], -100)
    return functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT)


def loss(
    name: str,
    updated: Any,
    frozen: Any,
    forget: Sequence[int],
    retain: Sequence[int],
    *,
    twins: bool,
) -> Tensor:
    """The weighed loss of one step, on two whole models."""
    total = torch.zeros(())
    for texts, numbers, term, weight in (
        (FORGET, forget, forget_term, 1.0),
        (RETAIN, retain, retain_term, ALPHA),
    ):
        ids_BT, mask_BT = batch_of(texts, numbers)
        counted_BT = mask_BT.clone()
        counted_BT[:, 0] = texts is RETAIN
        with torch.no_grad():
            before = hidden(name, frozen, ids_BT, mask_BT, READ)
        now = hidden(name, updated, ids_BT, mask_BT, READ)
        for w, h_BTD, h0_BTD in zip(DIRECTIONS.values(), now, before, strict=True):
            found = term(h_BTD[counted_BT], h0_BTD[counted_BT], w)
            total = total + weight * w.weight * found / len(READ)
    return total + CONTENT * content_term(updated, forget) if twins else total


def by_the_book(name: str, trained: tuple[int, ...], *, twins: bool) -> textbook.Textbook:
    return textbook.train(name, partial(loss, name, twins=twins), trained)


def bench(name: str, trained: tuple[int, ...], *, twins: bool, **more: Any) -> tiny.Bench:
    captured = (LOGPROBS, *READ) if twins else READ
    return tiny.bench(name, trained=trained, captured=captured, twins=twins, **more)


def settings() -> dict[str, Any]:
    return textbook.settings("multi-layer-probe", ALPHA, margin=MARGIN, content_weight=CONTENT)


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize(
    ("name", "trained", "micro_batch_size"),
    [*((name, (0, 1, 2, 3), 0) for name in WHERE), ("llama", (1, 3), 1), ("llama", (1, 3), 3)],
)
def test_same_matrices_as_the_textbook(
    name: str, trained: tuple[int, ...], micro_batch_size: int, twins: bool
) -> None:
    ours = bench(name, trained, twins=twins).trainer(
        **settings(), micro_batch_size=micro_batch_size
    )
    assert_equal(ours.run(), by_the_book(name, trained, twins=twins))


def test_same_matrices_from_boundaries_in_a_file(tmp_path: Any) -> None:
    world = bench("llama", (1, 3), twins=True, limit_bytes=0, folder=tmp_path)
    assert world.twins is not None and world.twins.storage == world.forget[0].storage == "file"
    ours = world.trainer(**settings()).run()
    assert_equal(ours, by_the_book("llama", (1, 3), twins=True))


def test_the_comparison_notices_a_wrong_update() -> None:
    """Controls: another order of batches, and no content term, are far outside the tolerance."""
    book = by_the_book("llama", (1, 3), twins=True)
    for twins, seed in ((True, SEED + 1), (False, SEED)):
        ours = bench("llama", (1, 3), twins=twins).trainer(**{**settings(), "seed": seed}).run()
        for key, weight in book.weights.items():
            learned = (weight - book.originals[key]).norm()
            assert (ours.weights[key] - weight).norm() > 0.1 * learned


@pytest.mark.parametrize("twins", [False, True])
def test_the_head_runs_for_twins_only(twins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget and retain texts stop after the deepest layer read, the prefix too."""
    world = bench("llama", (1, 2), twins=twins)
    heads: list[tuple[int, ...]] = []
    forwards: list[bool] = []
    real = Segment.forward

    def forward(self: Segment, *args: Any, **given: Any) -> Any:
        forwards.append(bool(given.get("logprobs")))
        return real(self, *args, **given)

    monkeypatch.setattr(Segment, "forward", forward)
    world.model.lm_head.register_forward_hook(
        lambda _module, _args, out: heads.append(tuple(out.shape[:2]))
    )
    world.forget[0].add_reference()
    world.forget[0].close()
    world.forget[0].compute()
    assert heads == []  # the reference of a mixed cut needs no head
    assert LOGPROBS not in world.forget[0].batch([0]).boundary.reference
    world.trainer(**{**settings(), "steps": 3}).run()
    assert len(heads) == sum(forwards) == (3 if twins else 0)
    assert len(forwards) > sum(forwards)
    batches = world.trainer(**settings()).batches
    longest = [max(len(TWINS[i]) for i in batches.at(step)[1]) for step in range(3)]
    assert heads == [(textbook.BATCH, width) for width in longest] * twins
