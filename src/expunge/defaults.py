"""What a run uses where its recipe says ``auto``.

The rules were found by runs on three models of 5 to 8 layers (LOG.md, "Depth and rate") and by
what the literature reports for 7-8B models; they are ours, not a paper's.
"""

from __future__ import annotations

import math

import torch

from expunge.errors import RecipeError
from expunge.model.segment import Segment

RELATIVE_STEP = 0.8


def default_layer(n_layers: int) -> int:
    """Deepest layer read, 0-based."""
    # RMU reads layer 7 of 32; a shallow model forgets only when nearly all of it is below.
    return 7 if n_layers >= 28 else max(0, min(n_layers - 2, round(0.75 * n_layers)))


def default_lr(segment: Segment) -> float:
    """Learning rate of AdamW, from the trained matrices alone.

    One AdamW step moves every element by about the learning rate. When the elements move
    together, the product moves by about ``lr · fan_in · |x|`` where it was about
    ``rms(W) · √fan_in · |x|``; RELATIVE_STEP is the ratio of the two. At 0.4 to 0.5 it gives
    RMU's 5e-5 on Zephyr-7B's shapes.
    """
    weights = list(segment.weights.values())
    fan_in = max(weights[0].shape) if len(set(weights[0].shape)) > 1 else weights[0].shape[0]
    rms = torch.stack([p.detach().float().square().mean() for p in weights]).mean().sqrt()
    lr = RELATIVE_STEP * float(rms) / math.sqrt(fan_in)
    return float(f"{lr:.2g}")


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises RecipeError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            what="The device cannot be used",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            allowed="auto, cpu, or cuda where PyTorch sees a GPU",
            fix="leave --device out",
        ) from error
    return device
