"""Probe objectives: take a manner out by the directions that tell it from its absence.

At each layer read, w is the unit direction of that layer's probe, from neutral to toxic; m and t
are the mean projections w·h of neutral and of toxic tokens in the original model. Means are over
tokens that count, then over layers by their weights. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.masked import masked_mean
from expunge.objectives.base import Activations, Captured, Direction, Loss, objective
from expunge.objectives.retain import cosine

MODES = ("suppress", "reverse")
RECONSTRUCTION = (
    "a reconstruction: the paper is known to use directions of layer-specific probes at several "
    "layers; the target projection, the content term, the relative retain term and the choice of "
    "layers are ours"
)


@objective(
    "multi-layer-probe",
    source="arXiv:2605.26454 (body not public to us)",
    deviations=RECONSTRUCTION,
    needs=Activations(forget_reference=True, probes="many"),
    retain_weight=5.0,
)
def multi_layer_probe(
    forget: Captured,
    retain: Captured,
    *,
    mode: str = "suppress",
    margin: float = 0.0,
    content_weight: float = 1.0,
) -> Loss:
    """Push forget activations off each layer's probe direction. **Reconstruction.**

    ``suppress``: ((w·h − m)/(t − m) + margin)², so that toxic text projects where neutral text
    does; ``reverse``: 1 + cos(h, w), toward the far side. The content term holds what w does not
    say: ‖h⊥ − h0⊥‖² / ‖h0‖², with h⊥ = h − (w·h)w. The retain term is ‖h − h0‖² / ‖h0‖².

    Args:
        forget: activations of forget texts, with reference and directions.
        retain: activations of retain texts, with reference.
        mode: ``suppress`` or ``reverse``.
        margin: how far beyond the neutral mean, in units of t − m; ``suppress`` only.
        content_weight: of the content term.
    """
    if mode not in MODES:
        raise RecipeError(
            what="Unknown mode of a probe objective",
            got=repr(mode),
            allowed=", ".join(MODES),
            fix="set objective_settings.mode=suppress",
        )
    push = partial(_suppress, margin=margin) if mode == "suppress" else _reverse
    pushed = _over_layers(forget, lambda layer, w: push(forget.acts[layer], w))
    if content_weight:
        pushed = pushed + content_weight * _over_layers(
            forget, lambda layer, w: _content(forget.acts[layer], forget.reference[layer], w)
        )
    kept = _over_layers(
        retain, lambda layer, _w: _relative(retain.acts[layer], retain.reference[layer])
    )
    return Loss(pushed, kept, partial(_watch, forget, retain))


@objective(
    "single-layer-probe",
    source="arXiv:2605.26454 (body not public to us): the multi-layer objective at one layer",
    deviations=RECONSTRUCTION + "; the layer is the one whose probe is best on held-out texts",
    needs=Activations(forget_reference=True, probes="one"),
    retain_weight=5.0,
)
def single_layer_probe(
    forget: Captured,
    retain: Captured,
    *,
    mode: str = "suppress",
    margin: float = 0.0,
    content_weight: float = 1.0,
) -> Loss:
    """`multi_layer_probe` at one layer. **Reconstruction.** Args: as there."""
    return multi_layer_probe(
        forget, retain, mode=mode, margin=margin, content_weight=content_weight
    )


def _over_layers(texts: Captured, of: Callable[[int, Direction], Tensor]) -> Tensor:
    """Weighted mean over layers of the masked mean of ``of(layer, direction)``, which is BT."""
    terms = [
        direction.weight * masked_mean(of(layer, direction), texts.mask_BT)
        for layer, direction in texts.directions.items()
    ]
    return torch.stack(terms).mean()


def _suppress(acts_BTD: Tensor, w: Direction, margin: float) -> Tensor:
    gap = w.toxic - w.neutral
    return ((_projection(acts_BTD, w) - w.neutral) / gap + margin).square()


def _reverse(acts_BTD: Tensor, w: Direction) -> Tensor:
    return 1 + cosine(acts_BTD, w.unit_D.to(acts_BTD.device).expand(acts_BTD.shape))


def _content(acts_BTD: Tensor, reference_BTD: Tensor, w: Direction) -> Tensor:
    change_BTD = acts_BTD.float() - reference_BTD.float()
    along_BT = _projection(change_BTD, w)
    across_BT = change_BTD.square().sum(-1) - along_BT.square()
    return across_BT / _power(reference_BTD)


def _relative(acts_BTD: Tensor, reference_BTD: Tensor) -> Tensor:
    return (acts_BTD.float() - reference_BTD.float()).square().sum(-1) / _power(reference_BTD)


def _power(reference_BTD: Tensor) -> Tensor:
    return reference_BTD.float().square().sum(-1).clamp(min=1e-12)


def _projection(acts_BTD: Tensor, w: Direction) -> Tensor:
    """w·h, shape BT."""
    projection_BT: Tensor = acts_BTD.float() @ w.unit_D.to(acts_BTD.device)
    return projection_BT


@torch.no_grad()
def _watch(forget: Captured, retain: Captured) -> dict[str, Tensor]:
    """Where forget texts project (0: neutral mean, 1: toxic mean), and the content they lose."""

    def place(layer: int, w: Direction) -> Tensor:
        return (_projection(forget.acts[layer], w) - w.neutral) / (w.toxic - w.neutral)

    watch = {
        "place": _over_layers(forget, place),
        "cos_retain": _over_layers(
            retain, lambda layer, _w: cosine(retain.acts[layer], retain.reference[layer])
        ),
    }
    if forget.reference:
        watch["content_lost"] = _over_layers(
            forget, lambda layer, w: _content(forget.acts[layer], forget.reference[layer], w)
        )
    return watch
