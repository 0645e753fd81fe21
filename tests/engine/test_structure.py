"""The parts of a model are found by shape and call order, in eleven architectures."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.llama import modeling_llama

import tiny
from expunge.errors import ModelError
from expunge.model.segment import Segment
from expunge.model.structure import find_structure

# layers, projection, tail, module that reads the residual
EXPECTED: dict[str, tuple[str, str, tuple[str, ...], str | None]] = {
    "llama": ("model.layers", "mlp.down_proj", (), "post_attention_layernorm"),
    "qwen2": ("model.layers", "mlp.down_proj", (), "post_attention_layernorm"),
    "qwen3": ("model.layers", "mlp.down_proj", (), "post_attention_layernorm"),
    "mistral": ("model.layers", "mlp.down_proj", (), "post_attention_layernorm"),
    "phi3": (
        "model.layers",
        "mlp.down_proj",
        ("resid_mlp_dropout",),
        "post_attention_layernorm",
    ),
    "olmo2": ("model.layers", "mlp.down_proj", ("post_feedforward_layernorm",), "mlp.gate_proj"),
    "olmo3": ("model.layers", "mlp.down_proj", ("post_feedforward_layernorm",), "mlp.gate_proj"),
    "gemma2": (
        "model.layers",
        "mlp.down_proj",
        ("post_feedforward_layernorm",),
        "pre_feedforward_layernorm",
    ),
    "gemma3": (
        "model.layers",
        "mlp.down_proj",
        ("post_feedforward_layernorm",),
        "pre_feedforward_layernorm",
    ),
    "gpt2": ("transformer.h", "mlp.c_proj", ("mlp.dropout",), "ln_2"),
    # Attention and MLP run side by side, so no module sees what the MLP is added to.
    "neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", ("post_mlp_dropout",), None),
}


def test_every_tiny_architecture_is_expected() -> None:
    assert EXPECTED.keys() == tiny.CONFIGS.keys()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_parts_are_found(name: str) -> None:
    model = tiny.tiny_model(name)
    found = find_structure(model)
    layers, projection, tail, residual = EXPECTED[name]
    assert found.layers_name == layers
    assert found.projection == projection
    assert found.tail == tail
    assert found.residual_input == residual
    assert found.splits_at_product
    assert found.n_layers == tiny.LAYERS
    assert found.hidden_size == tiny.HIDDEN
    assert found.head is model.get_output_embeddings()
    assert found.final_norm is not None and "Norm" in type(found.final_norm).__name__
    named = dict(model.named_parameters())
    for layer in range(tiny.LAYERS):
        assert named[found.weight_name(layer)] is found.projection_of(layer).weight
        assert found.projection_of(layer).weight.numel() in (32 * 48, 32 * 128)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_backbone_without_head(name: str) -> None:
    model = tiny.tiny_model(name)
    bare = model.base_model
    found = find_structure(bare)
    assert found.head is None
    assert found.backbone is bare
    assert found.projection == EXPECTED[name][1]


def test_looking_leaves_the_model_as_it_was() -> None:
    model = tiny.tiny_model("gemma2").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    find_structure(model)
    assert model.training and model.model.layers[0].mlp.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_mixtures_of_experts_say_what_is_missing(name: str) -> None:
    with pytest.raises(ModelError, match="Mixture-of-experts") as caught:
        find_structure(tiny.tiny_model(name))
    assert "experts.down_proj" in caught.value.got
    assert "3-D expert weights" in caught.value.fix


def test_encoder_decoders_are_refused_by_name() -> None:
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ModelError, match="Encoder-decoder"):
        find_structure(hf.T5ForConditionalGeneration(config))


def test_a_model_without_layers_is_refused() -> None:
    class Flat(torch.nn.Module):
        config = hf.LlamaConfig(num_hidden_layers=4)

    with pytest.raises(ModelError, match="No stack of decoder layers"):
        find_structure(Flat())


def _gated(self: Any, hidden_states: Any, *, post_norm: bool, **kwargs: Any) -> Any:
    """LlamaDecoderLayer.forward with a factor before the last sum."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        **{key: value for key, value in kwargs.items() if key != "past_key_values"},
    )
    hidden_states = hidden_states + attended
    mlp = self.mlp(self.post_attention_layernorm(hidden_states))
    return hidden_states + 0.5 * (self.outer_norm(mlp) if post_norm else mlp)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_gated_sum_is_cut_at_the_layers_input(
    monkeypatch: pytest.MonkeyPatch, post_norm: bool
) -> None:
    model = tiny.tiny_model("llama")
    for layer in model.model.layers:
        layer.outer_norm = modeling_llama.LlamaRMSNorm(tiny.HIDDEN)
        monkeypatch.setattr(layer, "forward", partial(_gated, layer, post_norm=post_norm))
    _assert_not_split_but_exact(model)


def test_granites_multiplier_is_seen() -> None:
    config = hf.GraniteConfig(**tiny._COMMON, residual_multiplier=0.3)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    _assert_not_split_but_exact(model)


def _assert_not_split_but_exact(model: Any) -> None:
    structure = find_structure(model)
    assert structure.projection == "mlp.down_proj"
    assert not structure.splits_at_product
    segment = Segment(model, structure, trained=(1, 2), captured=(2,))
    ids_BT, mask_BT = tiny.padded([[3, 4, 5, 6, 7], [8, 9, 10]])
    boundary = segment.boundary(ids_BT, mask_BT, reference=True)
    assert boundary.residual_BTD is None
    with torch.no_grad():
        # The weights move, so that a wrong cut cannot hide behind the original sum.
        for weight in segment.weights.values():
            weight.mul_(1.5).add_(0.1)
        acts = segment.forward(boundary, ids_BT, mask_BT)[2]
        full = model(ids_BT, attention_mask=mask_BT.long(), output_hidden_states=True)
    assert (acts - full.hidden_states[3])[mask_BT].abs().max() < 1e-6
    assert not torch.allclose(acts, boundary.reference[2])
