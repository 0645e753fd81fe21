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
from tiny import has_twins

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


def batch(name: str, seed: int, *, dtype: torch.dtype = torch.float32) -> Captured:
    """Random values of everything that an objective's registration asks for."""
    generator = torch.Generator().manual_seed(seed)
    twin = _nats(generator, mask_of(TWIN_LENGTHS), dtype) if has_twins(needs_of(name)) else None
    return replace(_seen(name, generator, MASK_BT, dtype), twin=twin)


def _nats(generator: torch.Generator, mask_BT: Tensor, dtype: torch.dtype) -> Captured:
    now_BT, then_BT = (-3 * torch.rand(2, B, T, generator=generator)).to(dtype)
    return Captured({}, {}, mask_BT, logprobs_BT=now_BT, reference_logprobs_BT=then_BT)


def _seen(name: str, generator: torch.Generator, mask_BT: Tensor, dtype: torch.dtype) -> Captured:
    if isinstance(needs_of(name), Logprobs):
        return _nats(generator, mask_BT, dtype)
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
    unit_D, aside_D = torch.randn(2, D, generator=generator)
    unit_D = unit_D / unit_D.norm()
    move_D = unit_D + aside_D - (aside_D @ unit_D) * unit_D
    gap = (0.9 + layer) * float(move_D.norm())
    return Direction(unit_D, move_D, -0.5, 0.4 + layer, 0.7, gap, (0.6, 1.4)[layer - 1])


def both(name: str, **settings: Any) -> tuple[Captured, Captured]:
    """A forget and a retain batch."""
    return batch(name, 0, **settings), replace(batch(name, 1, **settings), twin=None)


def changed(
    captured: Captured,
    now: Callable[[Tensor, Tensor], Tensor],
    then: Callable[[Tensor, Tensor], Tensor] = lambda tensor, _mask_BT: tensor,
    mask: Callable[[Tensor], Tensor] = lambda mask_BT: mask_BT,
) -> Captured:
    """The same batch, twin included, with functions of (tensor, mask) applied.

    ``now`` is for the model's values, ``then`` for the original's and targets.
    """
    mask_BT = captured.mask_BT
    logprobs_BT, reference_BT = captured.logprobs_BT, captured.reference_logprobs_BT
    return replace(
        captured,
        mask_BT=mask(mask_BT),
        acts={layer: now(t, mask_BT) for layer, t in captured.acts.items()},
        reference={layer: then(t, mask_BT) for layer, t in captured.reference.items()},
        target={layer: then(t, mask_BT) for layer, t in captured.target.items()},
        logprobs_BT=None if logprobs_BT is None else now(logprobs_BT, mask_BT),
        reference_logprobs_BT=None if reference_BT is None else then(reference_BT, mask_BT),
        twin=None if captured.twin is None else changed(captured.twin, now, then, mask),
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
    """Some texts of a batch; the twin is told what it weighs."""

    def some(tensor: Tensor, _mask_BT: Tensor) -> Tensor:
        return tensor if tensor.ndim == 1 else tensor[low:high]

    piece = changed(captured, some, some, lambda mask_BT: mask_BT[low:high])
    if piece.twin is None:
        return piece
    ours = sum(TWIN_LENGTHS[low:high]) / sum(TWIN_LENGTHS)
    weight = ours / (sum(LENGTHS[low:high]) / sum(LENGTHS))
    return replace(piece, twin=replace(piece.twin, weight=weight))


def tensors(captured: Captured) -> list[tuple[Tensor, Tensor]]:
    """All values with their masks."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(tensor: Tensor, mask_BT: Tensor) -> Tensor:
        seen.append((tensor, mask_BT))
        return tensor

    changed(captured, see, see)
    return seen


@every_objective
def test_losses_and_gradients_are_finite(name: str) -> None:
    loss, grads = gradients(name, *both(name))
    for scalar in (loss.forget, loss.retain, *loss.logs.values()):
        assert scalar.shape == () and bool(scalar.isfinite()) and scalar.dtype == torch.float32
    assert all(not value.requires_grad for value in loss.logs.values())
    assert all(bool(grad.isfinite().all()) for grad in grads)
    # All that the model says of forget texts, twins and retain texts is pulled at.
    assert all(float(grad.abs().max()) > 0 for grad in grads)


@every_objective
def test_the_first_step_where_nothing_has_moved(name: str) -> None:
    forget, retain = (
        replace(
            one,
            acts={k: h0.clone() for k, h0 in one.reference.items()},
            logprobs_BT=one.reference_logprobs_BT,
        )
        for one in both(name)
    )
    if forget.twin is not None:
        twin = replace(forget.twin, logprobs_BT=forget.twin.reference_logprobs_BT)
        forget = replace(forget, twin=twin)
    loss, grads = gradients(name, forget, retain)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    kept = 0.0
    if retain.logprobs_BT is not None:  # the original's own nats/token
        kept = masked_mean(-retain.logprobs_BT, MASK_BT).item()
        assert loss.logs["rise_retain"].item() == 0
    assert loss.retain.item() == pytest.approx(kept, abs=1e-5)


@every_objective
@pytest.mark.parametrize("value", [1e4, -7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(name: str, value: float) -> None:
    forget, retain = both(name)
    clean, clean_grads = gradients(name, spoiled(forget, 0.0), spoiled(retain, 0.0))
    dirty, dirty_grads = gradients(name, spoiled(forget, value), spoiled(retain, value))
    assert torch.equal(clean.forget, dirty.forget) and torch.equal(clean.retain, dirty.retain)
    assert {k: v.item() for k, v in clean.logs.items()} == {
        k: v.item() for k, v in dirty.logs.items()
    }
    # The model's values in their order: of forget texts, their twins, retain texts.
    masks = [one.mask_BT for one in (forget, forget.twin, retain) if one for _ in (one.acts or "1")]
    for clean_grad, dirty_grad, mask_BT in zip(clean_grads, dirty_grads, masks, strict=True):
        assert torch.equal(clean_grad, dirty_grad)
        assert not dirty_grad[~mask_BT].any()


@every_objective
@pytest.mark.parametrize("at", [1, 2])
def test_pieces_make_the_whole(name: str, at: int) -> None:
    """Weighed by their tokens; the forget terms of likelihood objectives by their texts."""
    part = OBJECTIVES.get(name).part
    forget, retain = both(name)
    whole = part(forget, retain)
    pieces = [
        (low, high, part(rows(forget, low, high), rows(retain, low, high)))
        for low, high in ((0, at), (at, B))
    ]
    by_texts = isinstance(needs_of(name), Logprobs)

    def share(term: str, low: int, high: int) -> float:
        if by_texts and not term.endswith("retain"):
            return (high - low) / B
        return sum(LENGTHS[low:high]) / sum(LENGTHS)

    for term in ("forget", "retain"):
        joined = sum(share(term, i, j) * getattr(loss, term).item() for i, j, loss in pieces)
        assert joined == pytest.approx(getattr(whole, term).item(), rel=1e-5)
    for key, value in whole.logs.items():
        joined = sum(share(key, i, j) * loss.logs[key].item() for i, j, loss in pieces)
        assert joined == pytest.approx(value.item(), rel=1e-5, abs=1e-7)


@every_objective
def test_inputs_are_left_alone_and_nothing_is_random(name: str) -> None:
    forget, retain = both(name)
    first, first_grads = gradients(name, forget, retain)
    for mine, fresh in zip((forget, retain), both(name), strict=True):
        for (tensor, _), (again, _) in zip(tensors(mine), tensors(fresh), strict=True):
            assert torch.equal(tensor, again)
            assert tensor.grad is None and not tensor.requires_grad
        for layer, direction in fresh.directions.items():
            assert torch.equal(mine.directions[layer].unit_D, direction.unit_D)
    second, second_grads = gradients(name, forget, retain)
    assert torch.equal(first.forget, second.forget) and torch.equal(first.retain, second.retain)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


@every_objective
@pytest.mark.parametrize("which", ["forget", "retain"])
def test_no_token_that_counts_is_an_error(name: str, which: str) -> None:
    texts = dict(zip(("forget", "retain"), both(name), strict=True))
    texts[which] = replace(texts[which], mask_BT=torch.zeros_like(MASK_BT))
    with pytest.raises(DataError, match="no token that counts"):
        OBJECTIVES.get(name).part(**texts)


@every_objective
def test_narrow_values_give_float32_losses(name: str) -> None:
    narrow, grads = gradients(name, *both(name, dtype=torch.bfloat16))
    wide, _ = gradients(name, *both(name))
    assert narrow.forget.dtype == narrow.retain.dtype == torch.float32
    assert narrow.forget.item() == pytest.approx(wide.forget.item(), rel=0.05)
    assert narrow.retain.item() == pytest.approx(wide.retain.item(), rel=0.05)
    assert all(value.dtype == torch.float32 for value in narrow.logs.values())
    assert all(bool(grad.isfinite().all()) for grad in grads)


STEERING = ["adaptive-rmu", "cosine-rmu", "rmu"]


@pytest.mark.parametrize("name", STEERING)
def test_a_target_for_each_token_may_be_the_same_one(name: str) -> None:
    forget, retain = both(name)
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
        OBJECTIVES.get(name).part(replace(batch(name, 0), target=wrong), batch(name, 1))


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
    forget, retain = both(name)
    bare = OBJECTIVES.get(name).part(replace(forget, reference={}), retain)
    assert torch.equal(bare.forget, OBJECTIVES.get(name).part(forget, retain).forget)


@every_objective
def test_origin_is_told(name: str) -> None:
    entry = OBJECTIVES.get(name)
    assert isinstance(entry.extras["needs"], Activations | Logprobs)
    assert entry.extras["retain_weight"] > 0
    assert "arXiv" in entry.source or "http" in entry.source
    assert entry.deviations.strip()
