"""What a run uses where its recipe says ``auto``.

The rules were found by runs on small models (LOG.md, "Depth, rate and direction") and, for deep
ones, by what the literature reports; they are ours, not a paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expunge.errors import RecipeError
from expunge.model.segment import Segment

RELATIVE_STEP = 1.3
# Up to so many layers a model is shallow: it is read at its last layer and trained throughout.
SHALLOW = 12
# RMU's layer for 7-8B models of 32 layers (arXiv:2403.03218).
DEEP_LAYER = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_layer(n_layers: int) -> int:
    """Deepest layer read, 0-based."""
    return n_layers - 1 if n_layers <= SHALLOW else DEEP_LAYER


def default_trained(layer: int, n_layers: int) -> tuple[int, ...]:
    """Layers whose projection is trained: RMU's three, or in a shallow model all below."""
    return tuple(range(0 if n_layers <= SHALLOW else max(0, layer - 2), layer + 1))


def check_layer(layer: Any, n_layers: int) -> None:
    """Raise RecipeError unless ``layer`` is a decoder layer of a model of ``n_layers``."""
    if not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise RecipeError(
            what="A layer is out of range",
            got=f"layer {layer}",
            allowed=f"0 to {n_layers - 1}, or auto",
            fix="set --layer within the range, or leave it out",
        )


def resolve_layers(
    layer: Any, trained: Sequence[int] | None, n_layers: int
) -> tuple[tuple[int, ...], int]:
    """(trained layers, deepest layer read); ``auto`` and None become what fits the model.

    Raises RecipeError for a layer that the model lacks, or one trained above the one read.
    """
    layer = default_layer(n_layers) if layer == "auto" else layer
    check_layer(layer, n_layers)
    found = default_trained(layer, n_layers) if trained is None else tuple(trained)
    return check_trained(found, layer), layer


def check_trained(trained: Sequence[int], layer: int) -> tuple[int, ...]:
    """The trained layers. Raises RecipeError unless they lie at or below the deepest one read."""
    if not trained or min(trained) < 0 or max(trained) > layer:
        raise RecipeError(
            what="The trained layers do not fit the layer that is read",
            got=f"trained_layers {list(trained)}, layer {layer}",
            allowed=f"one layer or more from 0 to {layer}",
            fix="raise --layer, or set trained_layers to lower ones",
        )
    return tuple(trained)


def fitting_tokens(max_tokens: int, config: Mapping[str, Any]) -> int:
    """``max_tokens``, or the context of the model with this config where that is shorter.

    Beyond its context a model with learned positions fails, and others were never trained.
    """
    text = config.get("text_config", config)
    sizes = (text.get(key) for key in ("max_position_embeddings", "n_positions"))
    context = next((size for size in sizes if isinstance(size, int) and size > 1), max_tokens)
    return min(max_tokens, context)


def default_lr(segment: Segment) -> float:
    """Learning rate of AdamW, from the trained matrices alone.

    One AdamW step moves every element by about the learning rate. When the elements move
    together, the product moves by about ``lr · fan_in · |x|`` where it was about
    ``rms(W) · √fan_in · |x|``; RELATIVE_STEP is the ratio of the two, at the first step.
    """
    weights = list(segment.weights.values())
    fan_in = max(weights[0].shape) if len(set(weights[0].shape)) > 1 else weights[0].shape[0]
    rms = torch.stack([p.detach().float().square().mean() for p in weights]).mean().sqrt()
    lr = RELATIVE_STEP * float(rms) / math.sqrt(fan_in)
    return float(f"{lr:.2g}")


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises RecipeError for one that models are not opened in."""
    if name not in DTYPES:
        raise RecipeError(
            what="Unknown dtype",
            got=repr(name),
            allowed=", ".join(DTYPES),
            fix="use --dtype bfloat16 for a large model",
        )
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises RecipeError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            what="The device cannot be used",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            allowed="auto, cpu, or cuda where PyTorch sees a GPU",
            fix="leave --device out",
        ) from error
    return device
