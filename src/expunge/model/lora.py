"""A patch as a PEFT LoRA adapter, by truncated SVD. PEFT itself is not needed to write one."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import PatchError
from expunge.files import write_json
from expunge.model.patch import Patch
from expunge.model.shards import save_tensors

# Their layers are Conv1D, which stores a weight as [in, out].
CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_IN_LAYER = re.compile(r"\.\d+\.")
_CONV1D_NAME = re.compile(r"\bh\.\d+\.(attn|mlp)\.c_")


@dataclass(frozen=True)
class LoraExport:
    """An adapter on disk and what it lost.

    Attributes:
        errors: tensor -> ‖delta - low rank‖ / ‖delta‖ (Frobenius); 0 is exact.
        total_error: the same over all tensors together.
    """

    path: Path
    errors: dict[str, float]
    total_error: float


def to_peft(
    patch: Patch,
    directory: Path | str,
    *,
    rank: int,
    base_model: str | Path,
    fan_in_fan_out: bool | None = None,
) -> LoraExport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` under ``directory``.

    `peft.PeftModel.from_pretrained(base, directory)` loads them; alpha equals the rank, so the
    adapter's scale is 1.

    Args:
        rank: of each tensor's approximation; more than a tensor's smaller side changes nothing.
        base_model: directory or Hub name, written into the adapter.
        fan_in_fan_out: whether layers are Conv1D as in GPT-2 (weight [in, out]); None asks the
            config of ``base_model`` if that is a local directory.

    Raises PatchError for rank < 1, an empty patch, or tensors that LoRA does not know (biases,
    norms, embeddings).
    """
    _check(patch, rank)
    if fan_in_fan_out is None:
        fan_in_fan_out = _is_conv1d(patch, base_model)
    rank = min(rank, max(min(delta.shape) for delta in patch.deltas.values()))
    adapter: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for name, delta in patch.deltas.items():
        # The head of such a model is a common Linear.
        is_transposed = fan_in_fan_out and _IN_LAYER.search(name) is not None
        b_OR, a_RI = _low_rank(delta.T if is_transposed else delta, rank)
        product = b_OR @ a_RI
        lost[name] = float((delta - (product.T if is_transposed else product)).norm())
        module = name.removesuffix(".weight")
        adapter[f"base_model.model.{module}.lora_A.weight"] = a_RI
        adapter[f"base_model.model.{module}.lora_B.weight"] = b_OR
    directory = Path(directory)
    save_tensors(directory / "adapter_model.safetensors", adapter, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "target_modules": [name.removesuffix(".weight") for name in patch.names],
    }
    write_json(directory / "adapter_config.json", config)
    errors = {name: _ratio(lost[name], float(delta.norm())) for name, delta in patch.deltas.items()}
    return LoraExport(directory, errors, _ratio(math.hypot(*lost.values()), patch.norm()))


def _low_rank(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest ``b_OR @ a_RI`` by SVD, padded with zeros where a side is shorter than R."""
    u, s, vh = torch.linalg.svd(delta_OI, full_matrices=False)
    kept = min(rank, len(s))
    b_OR = delta_OI.new_zeros(delta_OI.shape[0], rank)
    a_RI = delta_OI.new_zeros(rank, delta_OI.shape[1])
    root = s[:kept].sqrt()
    b_OR[:, :kept] = u[:, :kept] * root
    a_RI[:kept] = root[:, None] * vh[:kept]
    return b_OR, a_RI


def _check(patch: Patch, rank: int) -> None:
    if rank < 1 or not len(patch):
        raise PatchError(
            what="A LoRA adapter needs a rank of at least 1 and a patch that changes something",
            got=f"rank {rank}, {len(patch)} tensors",
            allowed="rank 1 or more",
            fix="choose a rank such as 16",
        )
    wrong = [name for name, delta in patch.deltas.items() if not _is_linear(name, delta)]
    if wrong:
        raise PatchError(
            what="LoRA holds changes of linear layers only",
            got=", ".join(wrong),
            allowed="weights of linear layers: 2-D, within a layer or the head",
            fix="apply the patch with `expunge apply`, which changes any tensor",
        )


def _is_linear(name: str, delta: Tensor) -> bool:
    is_head = name in ("lm_head.weight", "embed_out.weight")
    in_layer = name.endswith(".weight") and _IN_LAYER.search(name) is not None
    return delta.ndim == 2 and (is_head or in_layer)


def _is_conv1d(patch: Patch, base_model: str | Path) -> bool:
    config = Path(base_model) / "config.json"
    if config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") in CONV1D_TYPES
    unclear = [name for name in patch.names if _CONV1D_NAME.search(name)]
    if unclear:
        raise PatchError(
            what="It is not clear whether the layers are Conv1D, as in GPT-2, or Linear",
            got=f"{unclear[0]} of {base_model}, which is no local directory",
            allowed="a local base model, or fan_in_fan_out given",
            fix="pass fan_in_fan_out=True for GPT-2, False for GPT-Neo or StarCoder",
        )
    return False


def _ratio(lost: float, whole: float) -> float:
    """A delta of zeros is represented exactly."""
    return lost / whole if whole else 0.0
