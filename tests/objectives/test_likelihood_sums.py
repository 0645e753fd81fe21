"""The likelihood objectives on two texts, worked out by hand.

Log-probabilities in multiples of log 2, the first token of each text does not count:

    rejected   now (-1, -3) (-2)   original (-1, -1) (-4)   ratio −2, +2
    chosen     now (-2) (-1, -1)   original (-3) (-1, -2)   ratio +1, +1
    retain     now (-1, -2) (-3)   original (-1, -1) (-3)
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from expunge.errors import DataError
from expunge.objectives import Captured
from expunge.objectives.likelihood import dpo, graddiff, npo, simnpo

LOG_2 = log(2)
LONG, SHORT = [False, True, True], [False, True, False]


def texts(now: list[list[float]], then: list[list[float]], mask: list[list[bool]]) -> Captured:
    # What stands where nothing counts would show in any sum.
    def nats(values: list[list[float]]) -> Tensor:
        return LOG_2 * torch.tensor([[9.0, *row, *[9.0] * (2 - len(row))] for row in values])

    return Captured(
        {}, {}, torch.tensor(mask), logprobs_BT=nats(now), reference_logprobs_BT=nats(then)
    )


def chosen() -> Captured:
    return texts([[-2], [-1, -1]], [[-3], [-1, -2]], [SHORT, LONG])


def forget() -> Captured:
    rejected = texts([[-1, -3], [-2]], [[-1, -1], [-4]], [LONG, SHORT])
    return replace(rejected, twin=chosen())


def retain() -> Captured:
    return texts([[-1, -2], [-3]], [[-1, -1], [-3]], [LONG, SHORT])


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


def test_npo() -> None:
    loss = npo(forget(), retain(), beta=1.0)
    # −log σ(−βr) = log(1 + 2^r) for r in multiples of log 2: log 1.25 and log 5, each times 2/β.
    assert loss.forget.item() == about((2 * log(1.25) + 2 * log(5)) / 2)
    # Over tokens, not texts: (1 + 2 + 3)/3.
    assert loss.retain.item() == about(2 * LOG_2)


def test_npo_at_another_beta() -> None:
    # 2^(βr) is 1/2 and 2 at β = 1/2; 2/β = 4.
    loss = npo(forget(), retain(), beta=0.5)
    assert loss.forget.item() == about((4 * log(1.5) + 4 * log(3)) / 2)


def test_npo_starts_as_gradient_ascent() -> None:
    """At the original the loss is (2/β) log 2, and each counted token is pushed by 1/B."""
    at_first = forget()
    now_BT = at_first.reference_logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
    for beta in (0.1, 1.0):
        loss = npo(replace(at_first, logprobs_BT=now_BT), retain(), beta=beta)
        assert loss.forget.item() == about(2 / beta * LOG_2)
        (pull_BT,) = torch.autograd.grad(loss.forget, now_BT)
        assert pull_BT.flatten().tolist() == pytest.approx([0, 0.5, 0.5, 0, 0.5, 0], abs=1e-6)


def test_npo_flattens_as_a_text_becomes_unlikely() -> None:
    now_BT = forget().logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
    loss = npo(replace(forget(), logprobs_BT=now_BT), retain(), beta=1.0)
    (pull_BT,) = torch.autograd.grad(loss.forget, now_BT)
    # 2σ(βr)/B: 2·(1/5)/2 and 2·(4/5)/2.
    assert pull_BT[0, 1].item() == about(0.2) and pull_BT[1, 1].item() == about(0.8)


def test_graddiff() -> None:
    loss = graddiff(forget(), retain())
    # Texts count alike: 4 over two tokens, 2 over one. What they were before does not matter.
    assert loss.forget.item() == about(-2 * LOG_2)
    assert loss.retain.item() == about(2 * LOG_2)
    unknown = replace(forget(), reference_logprobs_BT=None)
    assert torch.equal(graddiff(unknown, retain()).forget, loss.forget)


def test_graddiff_pushes_each_text_by_its_length_alone() -> None:
    now_BT = forget().logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
    loss = graddiff(replace(forget(), logprobs_BT=now_BT), retain())
    (pull_BT,) = torch.autograd.grad(loss.forget, now_BT)
    # 1/B of a text, over its tokens: it never flattens.
    assert pull_BT.flatten().tolist() == pytest.approx([0, 0.25, 0.25, 0, 0.5, 0])


def test_simnpo() -> None:
    # Both texts have 2 nats/token in multiples of log 2: −log σ(2·log 2) is log(1 + 1/4).
    loss = simnpo(forget(), retain(), beta=1.0)
    assert loss.forget.item() == about(2 * log(1.25))
    assert loss.retain.item() == about(2 * LOG_2)
    unknown = replace(forget(), reference_logprobs_BT=None)
    assert torch.equal(simnpo(unknown, retain(), beta=1.0).forget, loss.forget)
    # 2^(2β) is 2 at β = 1/2; 2/β = 4.
    assert simnpo(forget(), retain(), beta=0.5).forget.item() == about(4 * log(1.5))


def test_simnpo_beyond_a_margin() -> None:
    # γ of log 2 stands beside β: −log σ(2·log 2 − log 2) is log(1 + 1/2), whatever β does to it.
    loss = simnpo(forget(), retain(), beta=1.0, gamma=LOG_2)
    assert loss.forget.item() == about(2 * log(1.5))
    loss = simnpo(forget(), retain(), beta=2.0, gamma=LOG_2)
    assert loss.forget.item() == about(log(1.125))


def test_simnpo_flattens_as_a_text_becomes_unlikely() -> None:
    texts_now = texts([[-1, -1], [-3]], [[0, 0], [0]], [LONG, SHORT])
    now_BT = texts_now.logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
    loss = simnpo(replace(texts_now, logprobs_BT=now_BT), retain(), beta=1.0)
    (pull_BT,) = torch.autograd.grad(loss.forget, now_BT)
    # 2σ(−β·nats)/B over the text's tokens: 2·(1/3)/2/2 and 2·(1/9)/2.
    assert pull_BT.flatten().tolist() == pytest.approx([0, 1 / 6, 1 / 6, 0, 1 / 9, 0])


def test_dpo() -> None:
    loss = dpo(forget(), retain(), beta=1.0)
    # Margins 1 − (−2) = 3 and 1 − 2 = −1: −log σ is log(1 + 1/8) and log(1 + 2).
    assert loss.forget.item() == about((log(1.125) + log(3)) / 2)
    assert loss.retain.item() == about(2 * LOG_2)
    assert dpo(forget(), retain(), beta=0.0001).forget.item() == pytest.approx(LOG_2, rel=1e-3)


def test_dpo_pulls_the_chosen_up_and_the_rejected_down() -> None:
    sources = [
        one.logprobs_BT.clone().requires_grad_()  # type: ignore[union-attr]
        for one in (forget(), chosen())
    ]
    given = replace(
        forget(), logprobs_BT=sources[0], twin=replace(chosen(), logprobs_BT=sources[1])
    )
    down_BT, up_BT = torch.autograd.grad(dpo(given, retain(), beta=1.0).forget, sources)
    # σ(−margin)/B: 1/9 and 2/3, halved.
    assert down_BT.flatten().tolist() == pytest.approx([0, 1 / 18, 1 / 18, 0, 1 / 3, 0])
    assert up_BT.flatten().tolist() == pytest.approx([0, -1 / 18, 0, 0, -1 / 3, -1 / 3])


@pytest.mark.parametrize("objective", [npo, dpo, graddiff, simnpo])
def test_what_is_watched(objective: object) -> None:
    logs = objective(forget(), retain()).logs  # type: ignore[operator]
    # Texts count alike: (4/2 + 2/1)/2. The retain texts lost one bit over three tokens.
    assert logs["nll_forget"].item() == about(2 * LOG_2)
    assert logs["rise_retain"].item() == about(LOG_2 / 3)


@pytest.mark.parametrize("objective", [npo, dpo])
def test_extreme_ratios_stay_finite(objective: object) -> None:
    """Texts of a thousand nats: sigmoid alone would say 0, and its logarithm −∞."""
    for far in (-1e4, 1e4):
        now_BT = torch.full((2, 3), far, requires_grad=True)
        loss = objective(replace(forget(), logprobs_BT=now_BT), retain(), beta=1.0)  # type: ignore[operator]
        (pull_BT,) = torch.autograd.grad(loss.forget, now_BT)
        assert bool(loss.forget.isfinite()) and bool(pull_BT.isfinite().all())
        gone = exp(-700)
        assert (float(pull_BT.abs().max()) <= gone) == (far < 0)


def test_extreme_likelihoods_stay_finite() -> None:
    """Where a text is nearly certain, and where it has a thousand nats."""
    for far in (0.0, -1e4):
        now_BT = torch.full((2, 3), far, requires_grad=True)
        given = replace(forget(), logprobs_BT=now_BT)
        for loss in (graddiff(given, retain()), simnpo(given, retain())):
            (pull_BT,) = torch.autograd.grad(loss.forget, now_BT, retain_graph=True)
            assert bool(loss.forget.isfinite()) and bool(pull_BT.isfinite().all())


@pytest.mark.parametrize(
    ("objective", "which"),
    [(npo, "text"), (dpo, "text"), (dpo, "twin"), (graddiff, "text"), (simnpo, "text")],
)
def test_a_single_text_without_a_token_is_an_error(objective: object, which: str) -> None:
    empty = torch.tensor([LONG, [False] * 3])
    given = {
        "text": replace(forget(), mask_BT=empty),
        "twin": replace(forget(), twin=replace(chosen(), mask_BT=empty)),
    }
    with pytest.raises(DataError, match="no token that counts"):
        objective(given[which], retain())  # type: ignore[operator]


def test_dpo_without_pairs_is_an_error() -> None:
    with pytest.raises(DataError, match="needs pairs"):
        dpo(replace(forget(), twin=None), retain())
