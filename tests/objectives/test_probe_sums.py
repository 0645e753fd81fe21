"""The probe objectives on one text of two tokens with D = 2, worked out by hand.

The probe reads w = (0.6, 0.8); the classes differ by d = (4, −0.5), so w·d = 2, d/(w·d) = (2, −1/4)
and ‖d‖² = 16.25. Neutral tokens read n = 1, toxic ones 3, with a spread of s = 0.5.

forget   h = (3, 4) (0, 2)   h0 = (0, 10) (2, 0)   w·h0 = 8 and 1.2
retain   h = (1, 2) (3, 0)   h0 = (1, 0)  (0, 4)   h − h0 = (0, 2) and (3, −4)
"""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.objectives import Captured, Direction
from expunge.objectives.probes import multi_layer_probe, single_layer_probe

W = Direction(
    unit_D=torch.tensor([0.6, 0.8]),
    move_D=torch.tensor([2.0, -0.25]),
    neutral=1.0,
    toxic=3.0,
    spread=0.5,
    gap=sqrt(16.25),
)
BOTH = torch.tensor([[True, True]])
# With the margin of one spread, w·h* must be 0.5, so 7.5 and 0.7 are to go:
# h* = (0, 10) − 7.5 d/(w·d) = (−15, 11.875) and (2, 0) − 0.7 d/(w·d) = (0.6, 0.175).
GOAL = ((-15.0, 11.875), (0.6, 0.175))
# h − h* = (18, −7.875) and (−0.6, 1.825).
PUSHED = (18**2 + 7.875**2, 0.6**2 + 1.825**2)
SUPPRESSED = sum(PUSHED) / 2 / 16.25
# ‖(0, 2)‖² = 4 and ‖(3, −4)‖² = 25.
KEPT = (4 + 25) / 2 / 16.25
# Two tokens of the neutral wording count, of 1 and 3 bits.
CONTENT = 2 * log(2)


def text(*tokens: tuple[float, float]) -> Tensor:
    return torch.tensor([tokens], dtype=torch.float32)


def twin() -> Captured:
    bits = torch.tensor([[9.0, 1.0, 3.0]])
    mask_BT = torch.tensor([[False, True, True]])
    return Captured({}, {}, mask_BT, logprobs_BT=-log(2) * bits)


def forget(mask_BT: Tensor = BOTH, w: Direction = W) -> Captured:
    acts, reference = text((3, 4), (0, 2)), text((0, 10), (2, 0))
    return Captured({3: acts}, {3: reference}, mask_BT, directions={3: w})


def retain(mask_BT: Tensor = BOTH) -> Captured:
    acts, reference = text((1, 2), (3, 0)), text((1, 0), (0, 4))
    return Captured({3: acts}, {3: reference}, mask_BT, directions={3: W})


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def test_the_direction_is_as_said() -> None:
    assert float(W.unit_D @ W.move_D) == about(1)
    assert float(W.move_D.norm()) * (W.toxic - W.neutral) == about(W.gap)


def test_suppress() -> None:
    loss = multi_layer_probe(forget(), retain())
    assert loss.forget.item() == about(SUPPRESSED)
    assert loss.retain.item() == about(KEPT)


def test_the_goal_reads_as_neutral_text_and_is_where_nothing_pulls() -> None:
    """h* is where the gradient is zero; w reads n − margin·s there, and only d was walked."""
    for margin, reads in ((1.0, 0.5), (0.0, 1.0), (-1.0, 1.5)):
        h_BTD = forget().acts[3].clone().requires_grad_()
        given = replace(forget(), acts={3: h_BTD})
        loss = multi_layer_probe(given, retain(), margin=margin).forget
        (pull_BTD,) = torch.autograd.grad(loss, h_BTD)
        # The gradient is 2 (h − h*) / ‖d‖², halved by the mean over two tokens.
        goal_TD = (h_BTD - pull_BTD * 16.25)[0].detach()
        if margin == 1.0:
            assert goal_TD.flatten().tolist() == pytest.approx([*GOAL[0], *GOAL[1]], abs=1e-4)
        before_TD = forget().reference[3][0]
        for goal_D, before_D in zip(goal_TD, before_TD, strict=True):
            assert float(W.unit_D @ goal_D) == about(min(reads, float(W.unit_D @ before_D)))
            moved_D = goal_D - before_D
            assert float(moved_D[0] * W.move_D[1] - moved_D[1] * W.move_D[0]) == pytest.approx(
                0, abs=1e-4
            )


def test_the_first_step_where_nothing_has_moved() -> None:
    """h = h0: the term is what is to go, in units of the class difference: (7.5/2)² and 0.35²."""
    still = replace(forget(), acts=dict(forget().reference))
    kept = replace(retain(), acts=dict(retain().reference))
    loss = multi_layer_probe(still, kept)
    assert loss.forget.item() == about((3.75**2 + 0.35**2) / 2)
    assert loss.retain.item() == 0


@pytest.mark.parametrize("neutral", [8.6, 20.0])
def test_a_text_below_the_margin_is_not_pushed(neutral: float) -> None:
    """Every token reads less than n − s already: h* is h0, whatever d is."""
    low = replace(W, neutral=neutral)
    h_BTD = forget().reference[3].clone().requires_grad_()
    given = replace(forget(w=low), acts={3: h_BTD})
    loss = multi_layer_probe(given, retain()).forget
    (pull_BTD,) = torch.autograd.grad(loss, h_BTD)
    assert loss.item() == 0 and not pull_BTD.any()
    # Control: a neutral mean just above the higher of the two projections does push.
    pushed = replace(given, directions={3: replace(W, neutral=8.4)})
    by_hand = (0.1 / 2) ** 2 / 2
    assert multi_layer_probe(pushed, retain()).forget.item() == pytest.approx(by_hand, rel=1e-4)


def test_the_margin_is_in_spreads() -> None:
    loss = multi_layer_probe(forget(), retain(), margin=0.0)
    # Only 7 and 0.2 are to go: h* = (−14, 11.75) and (1.6, 0.05).
    by_hand = (17**2 + 7.75**2) + (1.6**2 + 1.95**2)
    assert loss.forget.item() == about(by_hand / 2 / 16.25)


def test_reverse() -> None:
    loss = multi_layer_probe(forget(), retain(), mode="reverse")
    # cos((3, 4), w) = 1, cos((0, 2), w) = 0.8.
    assert loss.forget.item() == about((2 + 1.8) / 2)


def test_content() -> None:
    paired = replace(forget(), twin=twin())
    assert multi_layer_probe(paired, retain()).forget.item() == about(SUPPRESSED + CONTENT)
    loss = multi_layer_probe(paired, retain(), content_weight=0.5)
    assert loss.forget.item() == about(SUPPRESSED + CONTENT / 2)
    assert loss.retain.item() == about(KEPT)
    none = multi_layer_probe(paired, retain(), content_weight=0.0)
    assert none.forget.item() == about(SUPPRESSED)


def test_content_of_a_piece_counts_by_its_weight() -> None:
    piece = replace(forget(), twin=replace(twin(), weight=1.5))
    loss = multi_layer_probe(piece, retain())
    assert loss.forget.item() == about(SUPPRESSED + 1.5 * CONTENT)
    assert loss.logs["nll_content"].item() == about(1.5 * CONTENT)


def test_content_pulls_at_the_neutral_wording_alone() -> None:
    nats_BT = twin().logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
    paired = replace(forget(), twin=replace(twin(), logprobs_BT=nats_BT))
    (pull_BT,) = torch.autograd.grad(multi_layer_probe(paired, retain()).forget, nats_BT)
    assert pull_BT.flatten().tolist() == [0, -0.5, -0.5]


def test_what_does_not_count_is_left_out() -> None:
    only = torch.tensor([[False, True]])
    loss = multi_layer_probe(forget(only), retain(only))
    assert loss.forget.item() == about(PUSHED[1] / 16.25)
    assert loss.retain.item() == about(25 / 16.25)


def test_watches() -> None:
    logs = multi_layer_probe(replace(forget(), twin=twin()), retain()).logs
    # w·h = 5 and 1.6: (5 − 1)/2 and (1.6 − 1)/2.
    assert logs["place"].item() == about((2 + 0.3) / 2)
    assert logs["cos_retain"].item() == about(1 / sqrt(5) / 2)
    assert logs["nll_content"].item() == about(CONTENT)
    assert "nll_content" not in multi_layer_probe(forget(), retain()).logs


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
    paired = replace(forget(), twin=twin())
    for settings in ({"margin": 2.0}, {"mode": "reverse", "content_weight": 0.5}):
        one = single_layer_probe(paired, retain(), **settings)  # type: ignore[arg-type]
        many = multi_layer_probe(paired, retain(), **settings)  # type: ignore[arg-type]
        assert torch.equal(one.forget, many.forget) and torch.equal(one.retain, many.retain)


@pytest.mark.parametrize("objective", [multi_layer_probe, single_layer_probe])
def test_an_unknown_mode_is_refused(objective: object) -> None:
    with pytest.raises(RecipeError, match="suppress, reverse"):
        objective(forget(), retain(), mode="erase")  # type: ignore[operator]
