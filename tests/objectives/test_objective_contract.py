"""What holds for every registered objective.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.errors import DataError
from expunge.masked import masked_mean
from expunge.objectives import OBJECTIVES, Activations, Captured, Direction, Logprobs, Loss

B, T, D = 3, 5, 4
LENGTHS = (5, 2, 3)
TWIN_LENGTHS = (1, 4, 5)


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(T)[None, :] < torch.tensor(lengths)[:, None]


MASK_BT = mask_of(LENGTHS)

every_objective = pytest.mark.parametrize("name", OBJECTIVES.names())


def needs_of(name: str) -> Any:
    return OBJECTIVES.get(name).extras["needs"]


def layers_of(name: str) -> tuple[int, ...]:
    return (2,) if needs_of(name).probes == "one" else (1, 2)


def batch(
    name: str, seed: int, *, mask_BT: Tensor = MASK_BT, dtype: torch.dtype = torch.float32
) -> Captured:
    """Random values of everything that an objective's registration asks for."""
    generator = torch.Generator().manual_seed(seed)
    needs = needs_of(name)
    twin = None
    if needs.twin:
        masks_BT = mask_of(TWIN_LENGTHS)
        twin = _seen(name, generator, masks_BT, dtype)
    return replace(_seen(name, generator, mask_BT, dtype), twin=twin)


def _seen(name: str, generator: torch.Generator, mask_BT: Tensor, dtype: torch.dtype) -> Captured:
    if isinstance(needs_of(name), Logprobs):

        def nats_BT() -> Tensor:
            return (-3 * torch.rand(B, T, generator=generator)).to(dtype)

        return Captured({}, {}, mask_BT, logprobs_BT=nats_BT(), reference_logprobs_BT=nats_BT())
    layers = layers_of(name)

    def random() -> dict[int, Tensor]:
        return {k: torch.randn(B, T, D, generator=generator).to(dtype) for k in layers}

    acts, reference = random(), random()
    target_D = torch.rand(D, generator=generator)
    target_D /= target_D.norm()
    norms = {k: 1.0 + k for k in layers}
    directions = {k: _direction(k, generator) for k in layers}
    return Captured(
        acts,
        reference,
        mask_BT,
        dict.fromkeys(layers, target_D),
        norms,
        directions if needs_of(name).probes != "none" else {},
    )


def _direction(layer: int, generator: torch.Generator) -> Direction:
    unit_D = torch.randn(D, generator=generator)
    return Direction(unit_D / unit_D.norm(), -0.5, 0.4 + layer, 0.7, (0.6, 1.4)[layer - 1])


def both(name: str, **settings: Any) -> tuple[Captured, Captured]:
    """A forget and a retain batch."""
    return batch(name, 0, **settings), replace(batch(name, 1, **settings), twin=None)


def changed(
    captured: Captured,
    now: Callable[[Tensor, Tensor], Tensor],
    then: Callable[[Tensor, Tensor], Tensor] = lambda tensor, _mask_BT: tensor,
) -> Captured:
    """The same batch, twin included, with functions of (tensor, mask) applied.

    ``now`` is for the model's values, ``then`` for the original's and targets.
    """
    mask_BT = captured.mask_BT
    logprobs_BT, reference_BT = captured.logprobs_BT, captured.reference_logprobs_BT
    return replace(
        captured,
        acts={layer: now(t, mask_BT) for layer, t in captured.acts.items()},
        reference={layer: then(t, mask_BT) for layer, t in captured.reference.items()},
        target={layer: then(t, mask_BT) for layer, t in captured.target.items()},
        logprobs_BT=None if logprobs_BT is None else now(logprobs_BT, mask_BT),
        reference_logprobs_BT=None if reference_BT is None else then(reference_BT, mask_BT),
        twin=None if captured.twin is None else changed(captured.twin, now, then),
    )


def gradients(name: str, forget: Captured, retain: Captured) -> tuple[Loss, list[Tensor]]:
    """The loss, and its gradient to every value of the model that went in."""
    sources: list[Tensor] = []

    def leaf(tensor: Tensor, _mask_BT: Tensor) -> Tensor:
        sources.append(tensor.detach().clone().requires_grad_())
        return sources[-1]

    loss = OBJECTIVES.get(name).part(changed(forget, leaf), changed(retain, leaf))
    total = loss.total(forget_weight=1.0, retain_weight=2.0)
    total.backward()
    return loss, [a.grad if a.grad is not None else torch.zeros_like(a) for a in sources]


def spoiled(captured: Captured, value: float) -> Captured:
    """The same batch with ``value`` in every tensor under a false mask."""

    def spoil(tensor: Tensor, mask_BT: Tensor) -> Tensor:
        if tensor.ndim == 1:  # a target direction
            tensor = tensor.expand(B, T, D)
        where = mask_BT[..., None] if tensor.ndim == 3 else mask_BT
        return torch.where(where, tensor, value)

    return changed(captured, spoil, spoil)


def rows(captured: Captured, low: int, high: int) -> Captured:
    """Some texts of a batch."""

    def part(captured: Captured) -> Captured:
        def some(tensor: Tensor, _mask_BT: Tensor) -> Tensor:
            return tensor if tensor.ndim == 1 else tensor[low:high]

        twin = None if captured.twin is None else part(captured.twin)
        cut = changed(replace(captured, twin=None, mask_BT=MASK_BT), some, some)
        return replace(cut, mask_BT=captured.mask_BT[low:high], twin=twin)

    return part(captured)


@every_objective
def test_losses_and_gradients_are_finite(name: str) -> None:
    loss, grads = gradients(name, batch(0), batch(1))
    for scalar in (loss.forget, loss.retain, *loss.logs.values()):
        assert scalar.shape == () and bool(scalar.isfinite()) and scalar.dtype == torch.float32
    assert all(not value.requires_grad for value in loss.logs.values())
    assert all(bool(grad.isfinite().all()) for grad in grads)
    # Forget and retain activations of both layers are all pulled at.
    assert all(float(grad.abs().max()) > 0 for grad in grads)


@every_objective
def test_the_first_step_where_nothing_has_moved(name: str) -> None:
    forget, retain = (
        raw(one, {k: h0.clone() for k, h0 in one.reference.items()}) for one in (batch(0), batch(1))
    )
    loss, grads = gradients(name, forget, retain)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert loss.retain.item() == pytest.approx(0, abs=1e-5)


@every_objective
@pytest.mark.parametrize("value", [1e4, -7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(name: str, value: float) -> None:
    clean, clean_grads = gradients(name, spoiled(batch(0), 0.0), spoiled(batch(1), 0.0))
    dirty, dirty_grads = gradients(name, spoiled(batch(0), value), spoiled(batch(1), value))
    assert torch.equal(clean.forget, dirty.forget) and torch.equal(clean.retain, dirty.retain)
    assert {k: v.item() for k, v in clean.logs.items()} == {
        k: v.item() for k, v in dirty.logs.items()
    }
    for clean_BTD, dirty_BTD in zip(clean_grads, dirty_grads, strict=True):
        assert torch.equal(clean_BTD, dirty_BTD)
        assert not dirty_BTD[~MASK_BT].any()


@every_objective
@pytest.mark.parametrize("at", [1, 2])
def test_pieces_weighed_by_their_tokens_make_the_whole(name: str, at: int) -> None:
    part = OBJECTIVES.get(name).part
    forget, retain = batch(0), batch(1)
    whole = part(forget, retain)
    pieces = [
        (sum(LENGTHS[low:high]), part(rows(forget, low, high), rows(retain, low, high)))
        for low, high in ((0, at), (at, B))
    ]
    tokens = sum(LENGTHS)
    for term in ("forget", "retain"):
        joined = sum(n * getattr(loss, term).item() for n, loss in pieces) / tokens
        assert joined == pytest.approx(getattr(whole, term).item(), rel=1e-5)
    for key, value in whole.logs.items():
        joined = sum(n * loss.logs[key].item() for n, loss in pieces) / tokens
        assert joined == pytest.approx(value.item(), rel=1e-5)


@every_objective
def test_inputs_are_left_alone_and_nothing_is_random(name: str) -> None:
    forget, retain = batch(0), batch(1)
    first, first_grads = gradients(name, forget, retain)
    for captured, seed in ((forget, 0), (retain, 1)):
        again = batch(seed)
        for mine, fresh in (
            (captured.acts, again.acts),
            (captured.reference, again.reference),
            (captured.target, again.target),
        ):
            assert all(torch.equal(mine[layer], fresh[layer]) for layer in fresh)
        assert all(t.grad is None and not t.requires_grad for t in captured.reference.values())
    second, second_grads = gradients(name, forget, retain)
    assert torch.equal(first.forget, second.forget) and torch.equal(first.retain, second.retain)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


@every_objective
@pytest.mark.parametrize("which", ["forget", "retain"])
def test_no_token_that_counts_is_an_error(name: str, which: str) -> None:
    masks = {"forget": MASK_BT, "retain": MASK_BT, which: torch.zeros_like(MASK_BT)}
    with pytest.raises(DataError, match="no token that counts"):
        OBJECTIVES.get(name).part(
            batch(0, mask_BT=masks["forget"]), batch(1, mask_BT=masks["retain"])
        )


@every_objective
def test_narrow_activations_give_float32_losses(name: str) -> None:
    narrow, grads = gradients(name, batch(0, dtype=torch.bfloat16), batch(1, dtype=torch.bfloat16))
    wide, _ = gradients(name, batch(0), batch(1))
    assert narrow.forget.dtype == narrow.retain.dtype == torch.float32
    assert narrow.forget.item() == pytest.approx(wide.forget.item(), rel=0.05)
    assert all(bool(grad.isfinite().all()) for grad in grads)


STEERING = ["adaptive-rmu", "cosine-rmu", "rmu"]


@pytest.mark.parametrize("name", STEERING)
def test_a_target_for_each_token_may_be_the_same_one(name: str) -> None:
    forget, retain = batch(0), batch(1)
    full = {layer: u.expand(B, T, D).clone() for layer, u in forget.target.items()}
    one = OBJECTIVES.get(name).part(forget, retain)
    other = OBJECTIVES.get(name).part(replace(forget, target=full), retain)
    assert torch.equal(one.forget, other.forget)
    # And a target of another direction at one counted token is felt there.
    full[2][1, 0] *= -1
    assert not torch.equal(
        one.forget, OBJECTIVES.get(name).part(replace(forget, target=full), retain).forget
    )


@pytest.mark.parametrize("name", STEERING)
@pytest.mark.parametrize("shape", [(B, D), (T, D), (B, 1, D), (1,), ()])
def test_a_target_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    wrong = dict.fromkeys((1, 2), torch.ones(shape))
    with pytest.raises(ValueError, match="target"):
        OBJECTIVES.get(name).part(replace(batch(0), target=wrong), batch(1))


def test_a_batch_of_as_many_texts_as_tokens_hides_nothing() -> None:
    """With B = T a target of shape BD would broadcast along the tokens without a word."""
    square = {1: torch.randn(T, T, D)}
    mask_BT = torch.ones(T, T, dtype=torch.bool)
    forget = Captured(square, square, mask_BT, {1: torch.randn(T, D)})
    with pytest.raises(ValueError, match="target"):
        OBJECTIVES.get("rmu").part(forget, Captured(square, square, mask_BT))


@pytest.mark.parametrize(
    "name", [one.name for one in OBJECTIVES if not one.extras["needs"].forget_reference]
)
def test_what_is_not_asked_for_is_not_needed(name: str) -> None:
    forget, retain = batch(0), batch(1)
    bare = OBJECTIVES.get(name).part(replace(forget, reference={}), retain)
    assert torch.equal(bare.forget, OBJECTIVES.get(name).part(forget, retain).forget)


@every_objective
def test_origin_is_told(name: str) -> None:
    entry = OBJECTIVES.get(name)
    assert isinstance(entry.extras["needs"], Activations) and entry.extras["retain_weight"] > 0
    assert "arXiv" in entry.source or "http" in entry.source
    assert entry.deviations.strip()
