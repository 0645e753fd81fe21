"""What a run will read, compute and take, before anything is loaded: `expunge plan`.

Counts follow from the config and the headers of the safetensors files alone. Memory is exact for
weights and stored boundaries and an estimate for activations; time is the counted work divided by
the speed of a matrix product measured on this machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from expunge.defaults import resolve_dtype, resolve_layers
from expunge.model.checkpoint import Checkpoint

# Share of the matrix-product peak that the engine reaches (results/engine.json).
EFFICIENCY = 0.5
PROBE_SIZE, PROBE_SECONDS = 1024, 0.3


@dataclass(frozen=True)
class Plan:
    """The cost of a run.

    Attributes:
        layers_read: decoder layers read from disk, of ``layers_total``.
        bytes_read: of the weights read from disk, of ``bytes_total``.
        flops_prefix, flops_train: floating-point operations of the one pass over the texts and of
            all steps.
        memory_weights, memory_boundaries, memory_step: bytes of the opened weights with gradients
            and optimiser, of the stored boundaries (a mapped file beyond ``cache_gib``), and an
            estimate for the activations of one step.
        matmul_flops: operations a second of a matrix product, measured here.
        seconds: estimated time of prefix and training.
    """

    layer: int
    trained_layers: tuple[int, ...]
    layers_read: int
    layers_total: int
    bytes_read: int
    bytes_total: int
    flops_prefix: float
    flops_train: float
    memory_weights: int
    memory_boundaries: int
    memory_step: int
    matmul_flops: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def plan(model: str, *, layer: Any, steps: int, batch_size: int, tokens: int, dtype: str) -> Plan:
    """Count a run's cost.

    Args:
        layer: deepest layer read, or ``auto``.
        tokens: of every text; each step reads ``batch_size`` forget and as many retain texts.

    Raises:
        ModelError: the directory is no causal LM in safetensors.
        RecipeError: the layer or the dtype does not exist.
    """
    checkpoint = Checkpoint.open(model)
    total = checkpoint.n_layers
    trained, layer = resolve_layers(layer, None, total)
    width = resolve_dtype(dtype).itemsize
    hidden, inner = checkpoint.hidden_size, checkpoint.intermediate_size

    per_layer = [0] * total
    bytes_read = bytes_total = 0
    outside = 0
    for name, info in checkpoint.tensors.items():
        size = math.prod(info.shape)
        stored = info.end - info.start
        bytes_total += stored
        index = _layer_of(name, total)
        if index is not None:
            per_layer[index] += size
            bytes_read += stored if index <= layer else 0
        elif _is_embedding(name):
            outside += size
            bytes_read += stored

    projection = hidden * inner
    texts = 2 * steps * batch_size
    step_tokens = 2 * batch_size * tokens
    below = sum(per_layer[: trained[0]]) + per_layer[trained[0]] - projection
    segment = projection + sum(per_layer[trained[0] + 1 : layer + 1])
    # Two operations a weight and token forward; backward once for activations, and once more for
    # the trained matrices alone.
    flops_prefix = 2.0 * (below + segment) * texts * tokens
    flops_train = (4.0 * segment + 2.0 * len(trained) * projection) * step_tokens * steps
    weights = (sum(per_layer[: layer + 1]) + outside) * width
    # Gradient in the model's type, two moments and, for a narrow type, a master in float32.
    learned = len(trained) * projection * (width + 8 + (4 if width < 4 else 0))
    stored_width = inner + 2 * hidden
    speed = _matmul_flops(dtype)
    return Plan(
        layer=layer,
        trained_layers=trained,
        layers_read=layer + 1,
        layers_total=total,
        bytes_read=bytes_read,
        bytes_total=bytes_total,
        flops_prefix=flops_prefix,
        flops_train=flops_train,
        memory_weights=weights + learned,
        memory_boundaries=texts * tokens * stored_width * width,
        memory_step=step_tokens * len(trained) * (6 * hidden + 4 * inner) * width,
        matmul_flops=speed,
        seconds=(flops_prefix + flops_train) / (speed * EFFICIENCY),
    )


def _layer_of(name: str, total: int) -> int | None:
    """The decoder layer of a tensor: the first number in its name (``model.layers.3.…``)."""
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return int(number) if number is not None and int(number) < total else None


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))


def _matmul_flops(dtype: str) -> float:
    """Operations a second of a square matrix product here, the best of those that fit the time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(PROBE_SIZE, PROBE_SIZE, dtype=getattr(torch, dtype), device=device)
    best, spent = 0.0, 0.0
    while spent < PROBE_SECONDS:
        start = time.perf_counter()
        product = a @ a
        if device == "cuda":
            product.sum().item()
        took = time.perf_counter() - start
        best, spent = max(best, 2.0 * PROBE_SIZE**3 / took), spent + took
    return best
