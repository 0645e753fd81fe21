"""The segment computes what the whole model computes: activations and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from expunge.errors import RecipeError, TrainingError
from expunge.model.segment import Segment
from expunge.model.structure import Structure

TEXTS = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18]]


def whole_model(model: Any, structure: Structure, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Activations after a layer, by running the whole model."""
    seen: list[Tensor] = []

    def see(_module: Any, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = structure.layers[layer].register_forward_hook(see)
    try:
        model(ids, attention_mask=mask.long(), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def moved(segment: Segment) -> None:
    """Change the trained weights, so that nothing original can stand in for a result."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in segment.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))


def attached(model: Any) -> list[str]:
    """Every hook and replaced forward of a model, by module."""
    return [
        f"{name}: {kind}"
        for name, module in model.named_modules()
        for kind in [*module._forward_hooks, *module._forward_pre_hooks, *vars(module)]
        if kind == "forward" or isinstance(kind, int)
    ]


@pytest.mark.parametrize("trained", [(1, 2), (0,)])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_activations_and_gradients_are_the_whole_models(
    name: str, trained: tuple[int, ...]
) -> None:
    model = tiny.tiny_model(name)
    structure, segment = tiny.cut(model, trained=trained, captured=(2,))
    ids_BT, mask_BT = tiny.padded(TEXTS)
    with torch.no_grad():
        original = model(
            ids_BT, attention_mask=mask_BT.long(), output_hidden_states=True
        ).hidden_states[3]
    before = attached(model)  # transformers keeps hooks of its own once hidden states were asked
    boundary = segment.boundary(ids_BT, mask_BT, reference=True)
    light = segment.boundary(ids_BT, mask_BT, reference=False)
    assert (boundary.reference[2] - original)[mask_BT].abs().max() <= 1e-6
    assert not light.reference
    assert torch.equal(light.input_BTI, boundary.input_BTI)
    assert torch.equal(light.residual_BTD, boundary.residual_BTD)

    with segment.training() as weights:
        moved(segment)
        acts_BTD = segment.forward(boundary, ids_BT, mask_BT)[2]
        full_BTD = whole_model(model, structure, 2, ids_BT, mask_BT)
        # 1e-6 of the activations' size: float32 sums in another order.
        size = full_BTD.abs().max().clamp(min=1)
        assert ((acts_BTD - full_BTD)[mask_BT].abs().max() / size) <= 1e-6
        assert (acts_BTD - original)[mask_BT].abs().max() > 1e-2

        pull_BTD = torch.randn(acts_BTD.shape, generator=torch.Generator().manual_seed(1))
        pull_BTD[~mask_BT] = 0
        (acts_BTD * pull_BTD).sum().backward()
        ours = {key: weight.grad.clone() for key, weight in weights.items()}
        others = [p for p in model.parameters() if not any(p is w for w in weights.values())]
        assert all(p.grad is None for p in others)
        model.zero_grad()
        (full_BTD * pull_BTD).sum().backward()
        for key, weight in weights.items():
            assert (ours[key] - weight.grad).norm() <= 1e-5 * weight.grad.norm()
            assert weight.grad.norm() > 0
    assert attached(model) == before


def test_several_layers_are_captured() -> None:
    model = tiny.tiny_model("qwen2")
    structure, segment = tiny.cut(model, trained=(1, 3), captured=(3, 1, 2))
    ids_BT, mask_BT = tiny.padded(TEXTS)
    boundary = segment.boundary(ids_BT, mask_BT, reference=True)
    moved(segment)
    acts = segment.forward(boundary, ids_BT, mask_BT)
    assert sorted(acts) == [1, 2, 3]
    for layer, acts_BTD in acts.items():
        full_BTD = whole_model(model, structure, layer, ids_BT, mask_BT)
        assert (acts_BTD - full_BTD)[mask_BT].abs().max() <= 1e-6 * full_BTD.abs().max()


def test_without_padding_no_mask_is_needed() -> None:
    model = tiny.tiny_model("mistral")
    structure, segment = tiny.cut(model)
    ids_BT, mask_BT = tiny.padded([TEXTS[0], TEXTS[0][::-1]])
    acts_BTD = segment.forward(segment.boundary(ids_BT, mask_BT, reference=False), ids_BT, mask_BT)[
        2
    ]
    assert (acts_BTD - whole_model(model, structure, 2, ids_BT, mask_BT)).abs().max() <= 2e-6


def test_a_texts_activations_do_not_depend_on_the_padding() -> None:
    _, segment = tiny.cut(tiny.tiny_model("llama"))
    together = tiny.padded(TEXTS)
    alone = tiny.padded(TEXTS[2:])
    long = segment.forward(segment.boundary(*together, reference=False), *together)[2]
    short = segment.forward(segment.boundary(*alone, reference=False), *alone)[2]
    assert (long[2, :3] - short[0]).abs().max() <= 1e-6 * short[0].abs().max()


def test_weights_and_flags_are_put_back() -> None:
    model = tiny.tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    _, segment = tiny.cut(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def use() -> None:
        with segment.training() as weights:
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            assert names == weights.keys()
            moved(segment)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with segment.training():
        moved(segment)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_exception_leaves_no_hook() -> None:
    model = tiny.tiny_model("gpt2")
    structure, segment = tiny.cut(model)
    ids_BT, mask_BT = tiny.padded(TEXTS)
    boundary = segment.boundary(ids_BT, mask_BT, reference=False)

    def break_down(*_args: Any) -> None:
        raise RuntimeError("broken on purpose")

    handle = structure.layers[2].mlp.register_forward_pre_hook(break_down)
    with pytest.raises(RuntimeError, match="on purpose"):
        segment.forward(boundary, ids_BT, mask_BT)
    with pytest.raises(RuntimeError, match="on purpose"):
        segment.boundary(ids_BT, mask_BT, reference=True)
    handle.remove()
    assert not attached(model)


def test_a_replaced_forward_survives() -> None:
    model = tiny.tiny_model("llama")
    _, segment = tiny.cut(model)
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own  # as accelerate does
    batch = tiny.padded(TEXTS)
    segment.forward(segment.boundary(*batch, reference=False), *batch)
    assert vars(layer)["forward"] is own


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = tiny.tiny_model("gpt2").train()
    _, segment = tiny.cut(model)
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=True)
    acts_BTD = segment.forward(boundary, *batch)[2]
    assert (acts_BTD - boundary.reference[2]).abs().max() <= 1e-5
    assert model.training and model.transformer.h[0].mlp.dropout.training


def swap(structure: Structure, layer: int) -> None:
    """Let the model call a copy of one layer, so that hooks on the layer itself never fire."""
    layers = list(structure.layers)
    layers[layer] = copy.deepcopy(layers[layer])
    structure.backbone.layers = torch.nn.ModuleList(layers)


def test_a_capture_that_never_fires_raises() -> None:
    structure, segment = tiny.cut(tiny.tiny_model("llama"))
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=False)
    swap(structure, 2)
    with pytest.raises(TrainingError, match="never fired"):
        segment.forward(boundary, *batch)
    with pytest.raises(TrainingError, match="never fired"):
        segment.boundary(*batch, reference=True)


def test_a_boundary_that_is_never_reached_raises() -> None:
    structure, segment = tiny.cut(tiny.tiny_model("llama"))
    swap(structure, 1)
    with pytest.raises(TrainingError, match="never reached"):
        segment.boundary(*tiny.padded(TEXTS), reference=False)


@pytest.mark.parametrize(
    ("trained", "captured", "message"),
    [
        ((1, 4), (2,), "out of range"),
        ((-1,), (2,), "out of range"),
        ((1,), (7,), "out of range"),
        ((), (2,), "out of range"),
        ((1,), (), "out of range"),
        ((1, 3), (2,), "above every layer"),
        ((2,), (1, 3), "below every trained layer"),
    ],
)
def test_unfit_layers_are_refused(trained: Any, captured: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny.cut(tiny.tiny_model("llama"), trained=trained, captured=captured)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_bfloat16_runs(name: str) -> None:
    model = tiny.tiny_model(name, dtype=torch.bfloat16)
    structure, segment = tiny.cut(model)
    batch = tiny.padded(TEXTS)
    boundary = segment.boundary(*batch, reference=True)
    with segment.training() as weights:
        moved(segment)
        acts_BTD = segment.forward(boundary, *batch)[2]
        assert acts_BTD.dtype == torch.bfloat16
        full_BTD = whole_model(model, structure, 2, *batch)
        error = (acts_BTD - full_BTD)[batch[1]].float().abs().max()
        assert error <= 0.02 * full_BTD.float().abs().max()
        acts_BTD.float().square().mean().backward()
        assert all(bool(weight.grad.isfinite().all()) for weight in weights.values())
