"""Every objective on one text of two tokens with D = 2, worked out by hand.

forget   h = (3, 4) (0, 2)   h0 = (0, 10) (2, 0)   u = (0.6, 0.8)
retain   h = (1, 2) (3, 0)   h0 = (1, 0)  (0, 4)
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.objectives import Captured, Loss
from expunge.objectives.misdirection import adaptive_rmu, cosine_rmu, rmu
from expunge.objectives.rerouting import rerouting

U_D = torch.tensor([0.6, 0.8])
BOTH = torch.tensor([[True, True]])


def text(*tokens: tuple[float, float]) -> Tensor:
    return torch.tensor([tokens])


def forget(mask_BT: Tensor = BOTH, first_norm: float = 2.5) -> Captured:
    return Captured(
        {3: text((3, 4), (0, 2))}, {3: text((0, 10), (2, 0))}, mask_BT, {3: U_D}, {3: first_norm}
    )


def retain(mask_BT: Tensor = BOTH) -> Captured:
    return Captured({3: text((1, 2), (3, 0))}, {3: text((1, 0), (0, 4))}, mask_BT)


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


# Retain: cosines 1/√5 and 0.
ANGLE = (1 - 1 / sqrt(5) + 1) / 2


def test_rmu() -> None:
    loss = rmu(forget(), retain(), coefficient=5.0)
    # 5u = (3, 4): differences (0, 0) and (-3, -2), mean squares 0 and (9 + 4)/2.
    assert loss.forget.item() == about((0 + 6.5) / 2)
    # Differences (0, 2) and (3, -4), mean squares 2 and 12.5.
    assert loss.retain.item() == about((2 + 12.5) / 2)
    assert loss.total(forget_weight=2, retain_weight=10).item() == about(2 * 3.25 + 10 * 7.25)


def test_rmu_watches() -> None:
    logs = rmu(forget(), retain()).logs
    # cos((3, 4), u) = 1, cos((0, 2), u) = 0.8; norms 5 and 2.
    assert logs["cos_target"].item() == about(0.9)
    assert logs["norm_forget"].item() == about(3.5)
    assert logs["cos_retain"].item() == about(1 / sqrt(5) / 2)


def test_adaptive_rmu_per_sample() -> None:
    loss = adaptive_rmu(forget(), retain(), beta=2.0)
    # Mean norm of h0 is (10 + 2)/2 = 6, so the target is 12u = (7.2, 9.6):
    # differences (-4.2, -5.6) and (-7.2, -7.6), mean squares 24.5 and 54.8.
    assert loss.forget.item() == about((24.5 + 54.8) / 2)
    assert loss.retain.item() == about(7.25)


def test_adaptive_rmu_per_sample_leaves_out_what_does_not_count() -> None:
    loss = adaptive_rmu(forget(torch.tensor([[False, True]])), retain(), beta=2.0)
    # Only h0 = (2, 0) counts: 4u = (2.4, 3.2), difference (-2.4, -1.2).
    assert loss.forget.item() == about((5.76 + 1.44) / 2)


def test_adaptive_rmu_first_batch() -> None:
    # 2 · 2.5 = 5: the same target as rmu's above.
    loss = adaptive_rmu(forget(), retain(), beta=2.0, scale="first-batch")
    assert loss.forget.item() == about(3.25)


def test_adaptive_rmu_knows_two_scales() -> None:
    with pytest.raises(RecipeError, match="per-sample, first-batch"):
        adaptive_rmu(forget(), retain(), scale="per-token")


def test_cosine_rmu() -> None:
    loss = cosine_rmu(forget(), retain())
    assert loss.forget.item() == about((0 + 0.2) / 2)
    assert loss.retain.item() == about(ANGLE)


def test_cosine_rmu_with_norms() -> None:
    loss = cosine_rmu(forget(), retain(), norm_weight=2.0, norm_target=1.5, retain_norm_weight=3.0)
    # Ratios 0.5 and 1 against 1.5: squares 1 and 0.25.
    assert loss.forget.item() == about(0.1 + 2 * 0.625)
    # Ratios √5 and 3/4 against 1.
    assert loss.retain.item() == about(ANGLE + 3 * ((sqrt(5) - 1) ** 2 + 0.0625) / 2)


def test_rerouting() -> None:
    loss = rerouting(forget(), retain())
    # cos((3, 4), (0, 10)) = 0.8 and cos((0, 2), (2, 0)) = 0.
    assert loss.forget.item() == about(0.4)
    # ‖(0, 2)‖ = 2 and ‖(3, -4)‖ = 5.
    assert loss.retain.item() == about(3.5)


def test_rerouting_asks_for_no_more_than_a_right_angle() -> None:
    turned = Captured({0: text((3, 4), (0, 2))}, {0: text((0, 10), (0, -2))}, BOTH)
    kept = Captured({0: text((1, 2), (3, 0))}, {0: text((1, 0), (0, 4))}, BOTH)
    loss = rerouting(turned, kept)
    # The second cosine is -1 and counts as 0; the log keeps its sign.
    assert loss.forget.item() == about(0.4)
    assert loss.logs["cos_original"].item() == pytest.approx(-0.1, rel=1e-6)


@pytest.mark.parametrize("function", [rmu, adaptive_rmu, cosine_rmu, rerouting])
def test_layers_count_alike(function: object) -> None:
    def joined(*layers: int) -> Loss:
        one, kept = forget(), retain()
        tensors = {0: (one.acts[3], one.reference[3]), 1: (one.reference[3], one.acts[3])}
        return function(  # type: ignore[operator, no-any-return]
            Captured(
                {k: tensors[k][0] for k in layers},
                {k: tensors[k][1] for k in layers},
                BOTH,
                dict.fromkeys(layers, U_D),
            ),
            Captured(
                {k: kept.acts[3] * (k + 1) for k in layers},
                {k: kept.reference[3] for k in layers},
                BOTH,
            ),
        )

    first, second, both = joined(0), joined(1), joined(0, 1)
    assert both.forget.item() == about((first.forget + second.forget).item() / 2)
    assert both.retain.item() == about((first.retain + second.retain).item() / 2)
    assert both.logs.keys() == second.logs.keys()
    for key, value in both.logs.items():  # of the deepest layer
        assert value.item() == about(second.logs[key].item())
