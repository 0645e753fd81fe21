"""The probe objectives on one text of two tokens with D = 2, worked out by hand.

forget   h = (3, 4) (0, 2)   h0 = (0, 10) (2, 0)   w = (0.6, 0.8), m = 1, t = 3
retain   h = (1, 2) (3, 0)   h0 = (1, 0)  (0, 4)

w·h = 5 and 1.6. Off w, (3, 4) has nothing left; h − h0 = (3, −6) and (−2, 2).
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.objectives import Captured, Direction
from expunge.objectives.probes import multi_layer_probe, single_layer_probe

W = Direction(torch.tensor([0.6, 0.8]), neutral=1.0, toxic=3.0, spread=0.5)
BOTH = torch.tensor([[True, True]])
# ((5 − 1)/2)² and ((1.6 − 1)/2)².
PUSHED = (4 + 0.09) / 2
# ‖h − h0‖² − (w·(h − h0))²: 45 − 9 and 8 − 0.16, over 100 and 4.
CONTENT = (0.36 + 1.96) / 2
# ‖(0, 2)‖²/1 and ‖(3, −4)‖²/16.
KEPT = (4 + 25 / 16) / 2


def text(*tokens: tuple[float, float]) -> Tensor:
    return torch.tensor([tokens])


def forget(mask_BT: Tensor = BOTH) -> Captured:
    acts, reference = text((3, 4), (0, 2)), text((0, 10), (2, 0))
    return Captured({3: acts}, {3: reference}, mask_BT, directions={3: W})


def retain(mask_BT: Tensor = BOTH) -> Captured:
    acts, reference = text((1, 2), (3, 0)), text((1, 0), (0, 4))
    return Captured({3: acts}, {3: reference}, mask_BT, directions={3: W})


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def test_suppress() -> None:
    loss = multi_layer_probe(forget(), retain(), content_weight=0.0)
    assert loss.forget.item() == about(PUSHED)
    assert loss.retain.item() == about(KEPT)


def test_a_margin_asks_for_more() -> None:
    loss = multi_layer_probe(forget(), retain(), margin=0.5, content_weight=0.0)
    assert loss.forget.item() == about((2.5**2 + 0.8**2) / 2)


def test_reverse() -> None:
    loss = multi_layer_probe(forget(), retain(), mode="reverse", content_weight=0.0)
    # cos((3, 4), w) = 1, cos((0, 2), w) = 0.8.
    assert loss.forget.item() == about((2 + 1.8) / 2)


def test_content() -> None:
    loss = multi_layer_probe(forget(), retain(), content_weight=2.0)
    assert loss.forget.item() == about(PUSHED + 2 * CONTENT)


def test_what_does_not_count_is_left_out() -> None:
    only = torch.tensor([[False, True]])
    loss = multi_layer_probe(forget(only), retain(only))
    assert loss.forget.item() == about(0.09 + 1.96)
    assert loss.retain.item() == about(25 / 16)


def test_watches() -> None:
    logs = multi_layer_probe(forget(), retain()).logs
    assert logs["place"].item() == about((2 + 0.3) / 2)
    assert logs["content_lost"].item() == about(CONTENT)
    assert logs["cos_retain"].item() == about(1 / sqrt(5) / 2)


def test_layers_count_by_their_weights() -> None:
    def joined(weights: dict[int, float]) -> tuple[float, float]:
        directions = {k: replace(W, weight=weight) for k, weight in weights.items()}

        def over(one: Captured, factor: int) -> Captured:
            acts = {k: one.acts[3] * (1 + factor * k) for k in weights}
            return replace(
                one, acts=acts, reference=dict.fromkeys(weights, one.reference[3]),
                directions=directions,
            )  # fmt: skip

        loss = multi_layer_probe(over(forget(), 1), over(retain(), 1))
        return loss.forget.item(), loss.retain.item()

    first, second = joined({0: 1.0}), joined({1: 1.0})
    for mine, one, other in zip(joined({0: 0.5, 1: 1.5}), first, second, strict=True):
        assert one != other
        assert mine == about((0.5 * one + 1.5 * other) / 2)


def test_one_layer_is_the_same_formula() -> None:
    settings = {"mode": "reverse", "content_weight": 0.5}
    one = single_layer_probe(forget(), retain(), **settings)  # type: ignore[arg-type]
    many = multi_layer_probe(forget(), retain(), **settings)  # type: ignore[arg-type]
    assert torch.equal(one.forget, many.forget) and torch.equal(one.retain, many.retain)


@pytest.mark.parametrize("objective", [multi_layer_probe, single_layer_probe])
def test_an_unknown_mode_is_refused(objective: object) -> None:
    with pytest.raises(RecipeError, match="suppress, reverse"):
        objective(forget(), retain(), mode="erase")  # type: ignore[operator]
