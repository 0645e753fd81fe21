"""What the textbook implementations share: two whole models, whole forwards, one plain loop.

The textbooks share nothing with the engine but the texts, the order of batches and, where there
are any, the directions.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from expunge.training.loop import TrainingResult
from expunge.training.order import Batches

# Such a rate moves each matrix by a tenth of its norm, in every comparison (`assert_equal`).
STEPS, LR, BATCH, SEED = 20, 1.1e-2, 4, 7

# model -> decoder layers, and the module trained in each
WHERE = {
    "llama": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
}


@dataclass(frozen=True)
class Textbook:
    """The trained matrices, their originals, and the loss of each step."""

    weights: dict[str, Tensor]
    originals: dict[str, Tensor]
    losses: list[float]


# (updated model, frozen model, numbers of forget texts, numbers of retain texts) -> loss
StepLoss = Callable[[Any, Any, Sequence[int], Sequence[int]], Tensor]


def train(
    name: str, loss_of: StepLoss, trained: tuple[int, ...], *, schedule: str = "linear"
) -> Textbook:
    """STEPS steps of AdamW on the projections of some layers."""
    updated: Any = tiny.tiny_model(name)
    frozen = copy.deepcopy(updated)
    stack, part = WHERE[name]
    weights = {
        f"{stack}.{i}.{part}.weight": updated.get_submodule(f"{stack}.{i}.{part}").weight
        for i in trained
    }
    originals = {key: w.detach().clone() for key, w in weights.items()}
    updated.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(list(weights.values()), lr=LR, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 1 - step / STEPS if schedule == "linear" else 1.0
    )
    forget_lengths = [len(ids) for ids in tiny.texts(10, seed=0)]
    retain_lengths = [len(ids) for ids in tiny.texts(13, seed=50)]
    batches = Batches([forget_lengths], retain_lengths, BATCH, SEED)
    losses = []
    for step in range(STEPS):
        _, forget_batch, retain_batch = batches.at(step)
        loss = loss_of(updated, frozen, forget_batch, retain_batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        decay.step()
        losses.append(loss.item())
    return Textbook({key: w.detach() for key, w in weights.items()}, originals, losses)


def batch_of(texts: list[list[int]], numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Right-padded ids_BT and mask_BT of these texts."""
    return tiny.padded([texts[i] for i in numbers])


def hidden(
    name: str, model: Any, ids_BT: Tensor, mask_BT: Tensor, layers: Sequence[int]
) -> list[Tensor]:
    """Activations BTD after each of these layers, of a whole forward."""
    seen: dict[int, Tensor] = {}

    def see(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            seen[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    modules = [model.get_submodule(f"{WHERE[name][0]}.{layer}") for layer in layers]
    hooks = [m.register_forward_hook(see(i)) for i, m in zip(layers, modules, strict=True)]
    model(input_ids=ids_BT, attention_mask=mask_BT.long())
    for handle in hooks:
        handle.remove()
    return [seen[layer] for layer in layers]


def settings(objective: str, retain_weight: float, **own: Any) -> dict[str, Any]:
    """Our trainer's settings for the same run."""
    return {
        "objective": objective,
        "objective_settings": own,
        "retain_weight": retain_weight,
        "steps": STEPS,
        "lr": LR,
        "batch_size": BATCH,
        "seed": SEED,
    }


def assert_equal(ours: TrainingResult, book: Textbook) -> None:
    """Same matrices, to 1e-5 of their size and 1e-4 of what was learned, and the same losses."""
    assert ours.weights.keys() == book.weights.keys()
    for key, weight in book.weights.items():
        difference = (ours.weights[key] - weight).norm()
        learned = (weight - book.originals[key]).norm()
        print(f"{key}: weights {difference / weight.norm():.1e}, deltas {difference / learned:.1e}")
        assert difference <= 1e-5 * weight.norm()
        assert difference <= 1e-4 * learned
        # The run was worth comparing: the matrix has moved a good way.
        assert learned >= 0.1 * weight.norm()
    assert [entry.loss for entry in ours.log] == pytest.approx(book.losses, rel=1e-4)
    assert book.losses[-1] < book.losses[0]
