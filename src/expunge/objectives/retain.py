"""Retain terms: hold the activations of retain texts where the original model had them.

Random noise augmentation (RNA, arXiv:2501.19202) is an option of every retain term: the engine
adds it to the reference before the objective sees it. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from expunge.masked import masked_mean
from expunge.objectives.base import Captured, mean_over_layers

# Keeps the gradient of a norm finite where the difference is zero, as it is at the first step.
EPSILON = 1e-12


def squared_error(retain: Captured) -> Tensor:
    """Mean over tokens and dimensions of (h − h0)², averaged over layers."""
    return mean_over_layers(
        [
            masked_mean(_difference(retain, layer).square().mean(-1), retain.mask_BT)
            for layer in retain.acts
        ]
    )


def angle(retain: Captured) -> Tensor:
    """Mean over tokens of 1 − cos(h, h0), averaged over layers; in [0, 2]."""
    return mean_over_layers(
        [
            masked_mean(1 - cosine(acts, retain.reference[layer]), retain.mask_BT)
            for layer, acts in retain.acts.items()
        ]
    )


def distance(retain: Captured) -> Tensor:
    """Mean over tokens of ‖h − h0‖, averaged over layers."""
    return mean_over_layers(
        [
            masked_mean(safe_norm(_difference(retain, layer)), retain.mask_BT)
            for layer in retain.acts
        ]
    )


def _difference(batch: Captured, layer: int) -> Tensor:
    return batch.acts[layer].float() - batch.reference[layer].float()


def cosine(a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
    """Cosine along D, in float32, shape BT."""
    return functional.cosine_similarity(a_BTD.float(), b_BTD.float(), dim=-1)


def safe_norm(x_BTD: Tensor) -> Tensor:
    """Euclidean norm along D whose gradient at zero is zero, not NaN. Shape BT."""
    return torch.sqrt(x_BTD.square().sum(-1) + EPSILON)


def add_noise(
    reference: dict[int, Tensor], *, std: float, generator: torch.Generator
) -> dict[int, Tensor]:
    """RNA: reference + δ with δ ~ N(0, std²), drawn anew at every step.

    The paper writes ν for the variance, its code uses it as the standard deviation; so do we.
    """
    if std == 0:
        return reference
    return {
        layer: acts + std * torch.randn(acts.shape, generator=generator).to(acts)
        for layer, acts in reference.items()
    }
