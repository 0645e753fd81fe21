"""The central claim: the engine trains the same matrices as a textbook implementation.

The textbook below keeps two whole models and runs three whole forwards a step, as the public RMU
code does: the updated model on forget texts, the updated and the frozen model on retain texts.
It shares nothing with the engine but the texts, the order of batches and the direction u.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tiny
from expunge.data.tokens import training_batches
from expunge.objectives.targets import Targets

STEPS, LR, BATCH, SEED, LAYER = 20, 1e-2, 4, 7, 2
COEFFICIENT, ALPHA = 6.5, 3.0

# model -> decoder layers, and the module trained in each
WHERE = {
    "llama": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
}

# (updated forget BTD, updated retain BTD, frozen retain BTD, both masks BT, u_D) -> loss
TextbookLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def rmu(h: Tensor, kept: Tensor, frozen: Tensor, m: Tensor, n: Tensor, u_D: Tensor) -> Tensor:
    forget = functional.mse_loss(h[m], (COEFFICIENT * u_D).expand_as(h[m]))
    return forget + ALPHA * functional.mse_loss(kept[n], frozen[n])


def cosine_rmu(
    h: Tensor, kept: Tensor, frozen: Tensor, m: Tensor, n: Tensor, u_D: Tensor
) -> Tensor:
    def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
        return (a_ND * b_ND).sum(-1) / (a_ND.norm(dim=-1) * b_ND.norm(dim=-1))

    forget = (1 - cosine(h[m], u_D.expand_as(h[m]))).mean()
    return forget + ALPHA * (1 - cosine(kept[n], frozen[n])).mean()


LOSSES: dict[str, TextbookLoss] = {"rmu": rmu, "cosine-rmu": cosine_rmu}


def order(lengths: list[int], seed: int) -> list[tuple[int, ...]]:
    """Batches of the first STEPS steps: epoch after epoch."""
    batches: list[tuple[int, ...]] = []
    while len(batches) < STEPS:
        epoch = len(batches) // (len(lengths) // BATCH)
        batches += training_batches(
            len(lengths), batch_size=BATCH, seed=seed * 100_003 + epoch, lengths=lengths
        )
    return batches[:STEPS]


def textbook(
    name: str, loss_of: TextbookLoss, trained: tuple[int, ...], *, schedule: str = "linear"
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """(trained matrices, their originals, losses) of STEPS steps on two whole models."""
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

    def hidden(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = model.get_submodule(f"{stack}.{LAYER}").register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(input_ids=ids_BT, attention_mask=mask_BT.long())
        hook.remove()
        return seen[0]

    forget_texts, retain_texts = tiny.texts(10, seed=0), tiny.texts(13, seed=50)
    forget_order = order([len(ids) for ids in forget_texts], SEED)
    retain_order = order([len(ids) for ids in retain_texts], SEED + 1)
    u_D = Targets("positive", SEED, tiny.HIDDEN).at(0, torch.zeros(1, 1, dtype=torch.long))
    losses = []
    for forget_batch, retain_batch in zip(forget_order, retain_order, strict=True):
        forget_ids, forget_mask = tiny.padded([forget_texts[i] for i in forget_batch])
        retain_ids, retain_mask = tiny.padded([retain_texts[i] for i in retain_batch])
        counted = forget_mask.clone()
        counted[:, 0] = False  # the first token is left out of the forget term
        with torch.no_grad():
            frozen_BTD = hidden(frozen, retain_ids, retain_mask)
        loss = loss_of(
            hidden(updated, forget_ids, forget_mask),
            hidden(updated, retain_ids, retain_mask),
            frozen_BTD,
            counted,
            retain_mask,
            u_D,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        losses.append(loss.item())
    return {key: w.detach() for key, w in weights.items()}, originals, losses


def settings(objective: str) -> dict[str, Any]:
    own = {"coefficient": COEFFICIENT} if objective == "rmu" else {}
    return {
        "objective": objective,
        "objective_settings": own,
        "retain_weight": ALPHA,
        "steps": STEPS,
        "lr": LR,
        "batch_size": BATCH,
        "seed": SEED,
    }


def assert_equal_to_textbook(
    bench: tiny.Bench,
    name: str,
    objective: str,
    trained: tuple[int, ...],
    *,
    schedule: str = "linear",
    **more: Any,
) -> None:
    ours = bench.trainer(**settings(objective), lr_schedule=schedule, **more).run()
    weights, originals, losses = textbook(name, LOSSES[objective], trained, schedule=schedule)
    assert ours.weights.keys() == weights.keys() and len(weights) == len(trained)
    for key, weight in weights.items():
        difference = (ours.weights[key] - weight).norm()
        learned = (weight - originals[key]).norm()
        print(f"{key}: weights {difference / weight.norm():.1e}, deltas {difference / learned:.1e}")
        assert difference <= 1e-5 * weight.norm()
        assert difference <= 1e-4 * learned
        # The run was worth comparing: the matrix has moved a good way.
        assert learned >= 0.1 * weight.norm()
    assert [entry.loss for entry in ours.log] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("name", WHERE)
def test_same_matrices_as_the_textbook(name: str, objective: str) -> None:
    trained = (0, 1, 2)
    bench = tiny.bench(name, trained=trained)
    # The comparison covers padding: some batch holds texts of unequal length.
    assert len({len(ids) for ids in bench.retain.texts}) > 3
    assert_equal_to_textbook(bench, name, objective, trained)


def test_same_matrices_at_a_constant_rate() -> None:
    bench = tiny.bench("llama", trained=(1, 2))
    assert_equal_to_textbook(bench, "llama", "rmu", (1, 2), schedule="constant")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_same_matrices_with_accumulated_gradients(micro_batch_size: int) -> None:
    bench = tiny.bench("llama", trained=(1, 2))
    assert_equal_to_textbook(bench, "llama", "rmu", (1, 2), micro_batch_size=micro_batch_size)


def test_same_matrices_from_boundaries_in_a_file(tmp_path: Path) -> None:
    bench = tiny.bench("llama", trained=(1, 2), limit_bytes=0, folder=tmp_path)
    assert bench.retain.storage == "file"
    assert_equal_to_textbook(bench, "llama", "cosine-rmu", (1, 2))


def test_the_comparison_notices_a_wrong_update() -> None:
    """A control: another seed, hence another u and order, is far outside the tolerance."""
    bench = tiny.bench("llama", trained=(1, 2))
    ours = bench.trainer(**{**settings("rmu"), "seed": SEED + 1}).run()
    weights, originals, _ = textbook("llama", rmu, (1, 2))
    for key, weight in weights.items():
        assert (ours.weights[key] - weight).norm() > 0.1 * (weight - originals[key]).norm()
