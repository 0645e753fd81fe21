"""A plain RMU loop over whole models, as the public reference does it: the yardstick.

Two full models, three full forwards a step, and with ``all_gradients`` a gradient for every
parameter below the layer, though only three matrices are trained. Written from the method's
description (arXiv:2403.03218); used by the benchmark only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def textbook_rmu(
    model: Any,
    frozen: Any,
    *,
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    layer: int,
    target_D: Tensor,
    coefficient: float,
    retain_weight: float,
    lr: float,
    all_gradients: bool = True,
) -> dict[str, Tensor]:
    """Train ``down_proj`` of layers l-2 to l in place; returns the trained matrices.

    Args:
        model: a Llama-like causal LM in float32.
        frozen: a second one with the same weights, for the retain term's reference.
        forget, retain: a batch of token ids (BT) for each step; padding counts as text.
    """
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (layer - 2, layer - 1, layer)]
    trained = {name: model.get_parameter(name) for name in names}
    model.requires_grad_(all_gradients)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    for forget_BT, retain_BT in zip(forget, retain, strict=True):
        h_BTD = _activations(model, forget_BT, layer)
        loss = torch.nn.functional.mse_loss(h_BTD, (coefficient * target_D).expand_as(h_BTD))
        kept_BTD = _activations(model, retain_BT, layer)
        with torch.no_grad():
            h0_BTD = _activations(frozen, retain_BT, layer)
        loss = loss + retain_weight * torch.nn.functional.mse_loss(kept_BTD, h0_BTD)
        model.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: p.detach().clone() for name, p in trained.items()}


def _activations(model: Any, ids_BT: Tensor, layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: seen.append(out))
    try:
        model(input_ids=ids_BT, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
