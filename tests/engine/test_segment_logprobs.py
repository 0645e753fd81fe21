"""The segment up to the head says what the whole model says: log-probabilities and gradients.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

import tiny
from expunge.errors import ModelError, RecipeError, TrainingError
from expunge.model.boundaries import BoundaryStore
from expunge.model.hooks import stop
from expunge.model.segment import LOGPROBS, Segment
from expunge.model.structure import find_structure

TEXTS = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18]]


def whole_model(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-probability of each token but the first, shape B(T−1), from the whole model's logits."""
    logits_BTV = model(ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    logprobs_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
    found_BT: Tensor = logprobs_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return found_BT


def moved(segment: Segment) -> None:
    """Change the trained weights, so that nothing original can stand in for a result."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in segment.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))


def cut(name: str, trained: tuple[int, ...] = (1, 2), **settings: Any) -> tuple[Any, Segment]:
    model = tiny.tiny_model(name, **settings)
    return model, tiny.cut(model, trained=trained, captured=(LOGPROBS,))[1]


@pytest.mark.parametrize("trained", [(1, 3), (0,)])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_log_probabilities_and_gradients_are_the_whole_models(
    name: str, trained: tuple[int, ...]
) -> None:
    model, segment = cut(name, trained)
    ids_BT, mask_BT = tiny.padded(TEXTS)
    counted_BT = mask_BT[:, 1:]
    with torch.no_grad():
        original_BT = whole_model(model, ids_BT, mask_BT)
    boundary = segment.boundary(ids_BT, mask_BT, reference=True)
    light = segment.boundary(ids_BT, mask_BT, reference=False)
    reference_BT1 = boundary.reference[LOGPROBS]
    assert reference_BT1.shape == (*ids_BT.shape, 1) and reference_BT1.dtype == torch.float32
    assert not reference_BT1.requires_grad and not reference_BT1[:, 0].any()
    assert (reference_BT1[:, 1:, 0] - original_BT)[counted_BT].abs().max() <= 2e-6
    assert not light.reference
    assert torch.equal(light.input_BTI, boundary.input_BTI)

    with segment.training() as weights:
        # The route by the boundary is the direct one.
        again_BT1 = segment.forward(boundary, ids_BT, mask_BT)[LOGPROBS]
        assert (again_BT1 - reference_BT1)[mask_BT].abs().max() <= 5e-6

        moved(segment)
        ours_BT = segment.forward(boundary, ids_BT, mask_BT)[LOGPROBS][:, 1:, 0]
        full_BT = whole_model(model, ids_BT, mask_BT)
        assert (ours_BT - full_BT)[counted_BT].abs().max() <= 5e-6
        assert (ours_BT - original_BT)[counted_BT].abs().max() > 1e-2

        pull_BT = torch.randn(ours_BT.shape, generator=torch.Generator().manual_seed(1))
        pull_BT[~counted_BT] = 0
        (ours_BT * pull_BT).sum().backward()
        ours = {key: weight.grad.clone() for key, weight in weights.items()}
        others = [p for p in model.parameters() if not any(p is w for w in weights.values())]
        assert all(p.grad is None for p in others)
        model.zero_grad()
        (full_BT * pull_BT).sum().backward()
        for key, weight in weights.items():
            assert (ours[key] - weight.grad).norm() <= 1e-5 * weight.grad.norm()
            assert weight.grad.norm() > 0


def test_the_layers_below_the_cut_do_not_run() -> None:
    model, segment = cut("llama", (2,))
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=True)

    def never(*_args: Any) -> None:
        raise AssertionError("a layer of the prefix ran")

    for layer in model.model.layers[:2]:
        layer.self_attn.register_forward_pre_hook(never)
    assert segment.forward(boundary, *batch)[LOGPROBS].shape == (*batch[0].shape, 1)


def test_a_texts_log_probabilities_do_not_depend_on_the_padding() -> None:
    _, segment = cut("llama")
    together, alone = tiny.padded(TEXTS), tiny.padded(TEXTS[2:])
    long = segment.forward(segment.boundary(*together, reference=False), *together)[LOGPROBS]
    short = segment.forward(segment.boundary(*alone, reference=False), *alone)[LOGPROBS]
    assert (long[2, :3] - short[0]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_bfloat16_gives_float32_log_probabilities(name: str) -> None:
    model, segment = cut(name, dtype=torch.bfloat16)
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=True)
    assert boundary.reference[LOGPROBS].dtype == torch.float32
    with segment.training() as weights:
        moved(segment)
        ours_BT = segment.forward(boundary, *batch)[LOGPROBS][:, 1:, 0]
        assert ours_BT.dtype == torch.float32
        error = (ours_BT - whole_model(model, *batch))[batch[1][:, 1:]].abs().max()
        assert error <= 0.1
        ours_BT.mean().backward()
        assert all(bool(weight.grad.isfinite().all()) for weight in weights.values())


def test_the_original_is_stored_as_it_is_read() -> None:
    _, segment = cut("qwen2")
    store = BoundaryStore(segment, TEXTS, reference=True)
    store.compute()
    # Per token: the projection's input (48), the residual (32) and one number.
    assert store.nbytes == store.n_tokens * (48 + 32 + 1) * 4
    whole = store.batch([0, 1, 2])
    direct = segment.boundary(whole.ids_BT, whole.mask_BT, reference=True)
    difference = whole.boundary.reference[LOGPROBS] - direct.reference[LOGPROBS]
    assert difference[whole.mask_BT].abs().max() <= 5e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_model_opened_truncated_has_no_head(name: str) -> None:
    config = tiny.CONFIGS[name]()
    config.num_hidden_layers = 2
    truncated = AutoModel.from_config(config)  # the class that truncated models are opened as
    with pytest.raises(ModelError, match="without its head") as caught:
        Segment(truncated, find_structure(truncated), trained=(0, 1), captured=(LOGPROBS,))
    assert "2 layers" in caught.value.got


@pytest.mark.parametrize(
    ("trained", "captured"), [((1,), (LOGPROBS, 4)), ((4,), (LOGPROBS,)), ((), (LOGPROBS,))]
)
def test_unfit_layers_are_refused(trained: tuple[int, ...], captured: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        tiny.cut(tiny.tiny_model("llama"), trained=trained, captured=captured)


def test_every_layer_may_be_trained() -> None:
    _, segment = cut("llama", tuple(range(tiny.LAYERS)))
    assert len(segment.weights) == tiny.LAYERS


@pytest.mark.parametrize("captured", [(LOGPROBS,), (LOGPROBS, 2)])
def test_a_head_that_is_never_reached_raises(captured: tuple[int, ...]) -> None:
    model = tiny.tiny_model("llama")
    _, segment = tiny.cut(model, captured=captured)
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=False)

    model.lm_head.register_forward_pre_hook(lambda *_args: stop())
    with pytest.raises(TrainingError, match="never fired") as caught:
        segment.forward(boundary, *batch, logprobs=True)
    assert "no log-probabilities" in caught.value.got


# ---- layers and the head at once


def mixed(
    name: str, trained: tuple[int, ...] = (1, 2), read: tuple[int, ...] = (1, 2)
) -> tuple[Any, Segment]:
    model = tiny.tiny_model(name)
    return model, tiny.cut(model, trained=trained, captured=(*read, LOGPROBS))[1]


def hidden(model: Any, ids_BT: Tensor, mask_BT: Tensor, layer: int) -> Tensor:
    """Activations BTD after a layer, by running the whole model."""
    seen: list[Tensor] = []
    module = find_structure(model).layers[layer]
    handle = module.register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_layers_and_log_probabilities_are_the_whole_models(name: str) -> None:
    model, segment = mixed(name)
    batch = tiny.padded(TEXTS)
    mask_BT = batch[1]
    boundary = segment.boundary(*batch, reference=True)
    # The original of the layers only: what is read of the head is read of other texts.
    assert boundary.reference.keys() == {1, 2}
    with segment.training() as weights:
        moved(segment)
        assert segment.forward(boundary, *batch).keys() == {1, 2}
        assert segment.forward(boundary, *batch, logprobs=False).keys() == {1, 2}
        found = segment.forward(boundary, *batch, logprobs=True)
        assert found.keys() == {1, 2, LOGPROBS}
        for layer in (1, 2):
            full_BTD = hidden(model, *batch, layer)
            error = (found[layer] - full_BTD)[mask_BT].abs().max()
            assert error <= 1e-6 * full_BTD.abs().max().clamp(min=1)
        full_BT = whole_model(model, *batch)
        counted_BT = mask_BT[:, 1:]
        assert (found[LOGPROBS][:, 1:, 0] - full_BT)[counted_BT].abs().max() <= 5e-6

        # Both at once pull at the weights as they do in the whole model.
        total = (
            found[1][mask_BT].square().mean()
            + found[2][mask_BT].sin().mean()
            - (found[LOGPROBS][:, 1:, 0])[counted_BT].mean()
        )
        total.backward()
        ours = {key: weight.grad.clone() for key, weight in weights.items()}
        model.zero_grad()
        whole = (
            hidden(model, *batch, 1)[mask_BT].square().mean()
            + hidden(model, *batch, 2)[mask_BT].sin().mean()
            - whole_model(model, *batch)[counted_BT].mean()
        )
        whole.backward()
        for key, weight in weights.items():
            assert (ours[key] - weight.grad).norm() <= 1e-5 * weight.grad.norm()
            assert weight.grad.norm() > 0


def test_a_mixed_segment_reads_layers_as_one_without_head_does() -> None:
    model, segment = mixed("llama", (0, 2))
    plain = Segment(model, find_structure(model), trained=(0, 2), captured=(1, 2))
    batch = tiny.padded(TEXTS)
    boundaries = [one.boundary(*batch, reference=True) for one in (segment, plain)]
    for mine, theirs in zip(*(b.tensors() for b in boundaries), strict=True):
        assert torch.equal(mine, theirs)
    one, other = (s.forward(boundaries[0], *batch) for s in (segment, plain))
    assert all(torch.equal(one[layer], other[layer]) for layer in (1, 2))
    assert segment.layers_read == plain.layers_read == (1, 2)
    assert segment.reads_logprobs and not segment.reads_only_logprobs


def test_the_head_of_a_mixed_segment_runs_when_asked() -> None:
    model, segment = mixed("llama")
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=True)
    ran: list[int] = []
    model.model.layers[3].register_forward_pre_hook(lambda *_args: ran.append(3))
    model.lm_head.register_forward_pre_hook(lambda *_args: ran.append(99))
    segment.boundary(*batch, reference=True)
    segment.forward(boundary, *batch)
    assert ran == []
    segment.forward(boundary, *batch, logprobs=True)
    assert ran == [3, 99]


def test_a_store_of_a_mixed_segment_holds_the_layers() -> None:
    _, segment = mixed("qwen2")
    store = BoundaryStore(segment, TEXTS, reference=True)
    store.compute()
    # The projection's input (48), the residual (32) and two layers (32 each).
    assert store.nbytes == store.n_tokens * (48 + 3 * 32) * 4
    twins = BoundaryStore(segment, TEXTS, reference=False)
    twins.compute()
    assert twins.nbytes == twins.n_tokens * (48 + 32) * 4
    batch = twins.batch([0, 2])
    found = segment.forward(batch.boundary, batch.ids_BT, batch.mask_BT, logprobs=True)
    whole_BT = whole_model(segment.model, batch.ids_BT, batch.mask_BT)
    error = (found[LOGPROBS][:, 1:, 0] - whole_BT)[batch.mask_BT[:, 1:]].abs().max()
    assert error <= 5e-6


@pytest.mark.parametrize(
    ("trained", "captured", "message"),
    [
        ((1, 3), (LOGPROBS, 2), "above every layer"),
        ((2,), (LOGPROBS, 1, 3), "below every trained layer"),
    ],
)
def test_unfit_layers_of_a_mixed_segment_are_refused(
    trained: tuple[int, ...], captured: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny.cut(tiny.tiny_model("llama"), trained=trained, captured=captured)


def test_a_layer_of_a_mixed_segment_needs_the_head_too() -> None:
    config = tiny.CONFIGS["llama"]()
    truncated = AutoModel.from_config(config)
    with pytest.raises(ModelError, match="without its head"):
        Segment(truncated, find_structure(truncated), trained=(1,), captured=(LOGPROBS, 2))
