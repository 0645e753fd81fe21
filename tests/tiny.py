"""Tiny random models of many architectures, texts for them, and trainers over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from expunge.model.boundaries import BoundaryStore
from expunge.model.segment import LOGPROBS, Segment
from expunge.model.structure import Structure, find_structure
from expunge.objectives import OBJECTIVES, Direction, Logprobs
from expunge.objectives.base import Needs
from expunge.registry import settings_of
from expunge.training.loop import Trainer
from expunge.training.settings import TrainingSettings
from expunge.training.tradeoff import TradeoffKind, rule

VOCABULARY, HIDDEN, LAYERS = 64, 32, 4

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4}

# A window shorter than the texts, so that sliding attention differs from full attention.
_WINDOW = {"sliding_window": 4}

CONFIGS: dict[str, Any] = {
    "llama": partial(hf.LlamaConfig, **_COMMON),
    "qwen2": partial(hf.Qwen2Config, **_COMMON),
    "qwen3": partial(hf.Qwen3Config, **_COMMON, head_dim=8),
    "olmo2": partial(hf.Olmo2Config, **_COMMON),
    "olmo3": partial(hf.Olmo3Config, **_COMMON, **_WINDOW),
    "mistral": partial(hf.MistralConfig, **_COMMON, **_WINDOW),
    "gemma2": partial(hf.Gemma2Config, **_COMMON, **_WINDOW, head_dim=8),
    "gemma3": partial(hf.Gemma3TextConfig, **_COMMON, **_WINDOW, head_dim=8),
    "phi3": partial(hf.Phi3Config, **_COMMON),
    "gpt2": partial(hf.GPT2Config, **_GPT2, **_SPECIAL, n_positions=64),
    "neox": partial(hf.GPTNeoXConfig, **_NEOX),
}
MIXTURES: dict[str, Any] = {
    "mixtral": partial(hf.MixtralConfig, **_COMMON, num_local_experts=4),
    "qwen3-moe": partial(
        hf.Qwen3MoeConfig,
        **_COMMON,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
    ),
}


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model. Every parameter is drawn here, norms and biases included."""
    config = {**CONFIGS, **MIXTURES}[name]()
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                # Large enough that each layer moves the residual stream visibly.
                parameter.copy_(0.15 * noise)
    return model.to(dtype)


def texts(n: int, *, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Token ids of n texts of 4 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def number(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return [number(3, VOCABULARY, length) for length in number(4, longest + 1, n)]


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids_BT and their mask_BT."""
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask_BT = torch.tensor([[i < len(row) for i in range(longest)] for row in ids])
    return ids_BT, mask_BT


def cut(
    model: Any, *, trained: Sequence[int] = (1, 2), captured: Sequence[int] = (2,)
) -> tuple[Structure, Segment]:
    """The structure of a model and its segment."""
    structure = find_structure(model)
    return structure, Segment(model, structure, trained=trained, captured=captured)


def directions(layers: Sequence[int]) -> dict[int, Direction]:
    """What probes might have found: directions, moves along others, weights of mean 1."""
    generator = torch.Generator().manual_seed(77)
    weights = [1 + (i - (len(layers) - 1) / 2) / len(layers) for i in range(len(layers))]
    made = {}
    for layer, weight in zip(layers, weights, strict=True):
        vector_D, aside_D = torch.randn(2, HIDDEN, generator=generator)
        unit_D = vector_D / vector_D.norm()
        # The classes differ along another direction than the probe reads.
        move_D = unit_D + 0.2 * (aside_D - (aside_D @ unit_D) * unit_D)
        neutral, toxic = -1.5, 0.5 + layer
        gap = (toxic - neutral) * float(move_D.norm())
        made[layer] = Direction(unit_D, move_D, neutral, toxic, 0.8, gap, weight)
    return made


def has_twins(needs: Needs) -> bool:
    """Whether an objective asks for the forget texts' other wordings."""
    return needs.twin if isinstance(needs, Logprobs) else needs.twin_logprobs


@dataclass
class Bench:
    """A small world to train in: a model, one or two topics, retain texts, perhaps twins."""

    model: Any
    segment: Segment
    forget: list[BoundaryStore]
    retain: BoundaryStore
    twins: BoundaryStore | None = None

    def trainer(
        self,
        objective: str = "rmu",
        *,
        retain_weight: float = 1.0,
        tradeoff: TradeoffKind = "fixed",
        objective_settings: dict[str, Any] | None = None,
        needs: Needs | None = None,
        **settings: Any,
    ) -> Trainer:
        """A new trainer over the stores; ``needs`` are the objective's own unless given."""
        entry = OBJECTIVES.get(objective)
        own: Needs = entry.extras["needs"]
        needs = needs or own.given(settings_of(entry, objective_settings or {}))
        return Trainer(
            self.segment,
            self.forget,
            self.retain,
            objective=partial(entry.part, **(objective_settings or {})),
            tradeoff=rule(tradeoff, retain_weight),
            settings=TrainingSettings(**{"steps": 8, "lr": 1e-2, "batch_size": 4, **settings}),
            needs=needs,
            twins=self.twins if has_twins(needs) else None,
            directions=directions(self.segment.layers_read) if needs.probes != "none" else None,
        )


def bench(
    name: str = "llama",
    *,
    topics: int = 1,
    dtype: torch.dtype = torch.float32,
    trained: Sequence[int] = (1, 2),
    captured: Sequence[int] = (2,),
    twins: bool = False,
    limit_bytes: int | None = None,
    folder: Path | None = None,
    device: str = "cpu",
) -> Bench:
    """A model with computed stores of 10 texts a topic and 13 retain texts.

    With ``twins`` each text of the only topic has another one beside it.
    """
    model = tiny_model(name, dtype=dtype).to(device)
    _, segment = cut(model, trained=trained, captured=captured)
    sets = [*(texts(10, seed=topic) for topic in range(topics)), texts(13, seed=50)]
    if twins:
        sets.append(texts(10, seed=90))
    stores = [
        BoundaryStore(
            segment,
            ids,
            reference=index <= topics or segment.reads_only_logprobs,
            limit_bytes=limit_bytes,
            spill_directory=folder,
        )
        for index, ids in enumerate(sets)
    ]
    for store in stores:
        store.compute()
    return Bench(
        model, segment, stores[:topics], stores[topics], stores[topics + 1] if twins else None
    )


def bench_for(objective: str, **settings: Any) -> Bench:
    """A bench that holds what an objective needs: its layers or the head, and twins."""
    needs: Needs = OBJECTIVES.get(objective).extras["needs"]
    layers = (1, 2) if needs.probes == "many" else (2,)
    captured = (LOGPROBS,) if isinstance(needs, Logprobs) else layers
    if has_twins(needs):
        captured = (LOGPROBS, *(layer for layer in captured if layer != LOGPROBS))
    return bench(**{"captured": captured, "twins": has_twins(needs), **settings})
