"""Probe objectives: take a manner out by the directions that tell it from its absence.

At each layer read, w is the unit direction of that layer's probe, from neutral to toxic; n is the
mean projection w·h of neutral tokens in the original model, s the spread of projections within
the classes, d the difference of the class means (toxic − neutral). Means are over tokens that
count, then over layers by their weights. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.masked import masked_mean
from expunge.objectives.base import Activations, Captured, Direction, Knob, Loss, objective
from expunge.objectives.likelihood import nats_per_token
from expunge.objectives.retain import cosine

MODES = ("suppress", "reverse")
RECONSTRUCTION = (
    "a reconstruction: the paper is known to use directions of layer-specific probes at several "
    "layers; the target activations, the content term, the retain term in units of the class "
    "difference, the choice of layers and the retain texts as the other class of knowledge are ours"
)
KNOBS = (
    Knob("margin", 0.0, 4.0, scale="linear"),
    # Where rudeness begins at a word that both wordings lead up to, 50 was needed (LOG.md).
    Knob("content_weight", 0.1, 100.0, relative=True),
)


@objective(
    "multi-layer-probe",
    source="arXiv:2605.26454 (body not public to us); the move is LEACE's (arXiv:2306.03819)",
    deviations=RECONSTRUCTION,
    needs=Activations(forget_reference=True, probes="many", twin_logprobs=True),
    retain_weight=0.5,
    knobs=KNOBS,
)
def multi_layer_probe(
    forget: Captured,
    retain: Captured,
    *,
    mode: str = "suppress",
    margin: float = 1.0,
    content_weight: float = 1.0,
) -> Loss:
    """Push forget activations off each layer's probe direction. **Reconstruction.**

    ``suppress``: toward h* = h0 − ReLU(w·h0 − n + margin·s) · d / (w·d), the least change of h0
    along d after which w reads what it reads in neutral text; the term is ‖h − h*‖² / ‖d‖². Moving
    along d and not along w is what linear erasure does (LEACE, for two classes and an LDA probe):
    w reads, d is what toxic text adds. h* keeps the rest of h0, so what is said stays.
    ``reverse``: 1 + cos(h, w), toward the far side.

    The content term is the nats/token of the neutral wordings, where the data is paired: what is
    taken from toxic words should go to these. The retain term is ‖h − h0‖² / ‖d‖².

    Args:
        forget: activations of forget texts, with reference, directions and, if paired, twins.
        retain: activations of retain texts, with reference and directions.
        mode: ``suppress`` or ``reverse``.
        margin: how far beyond the neutral mean, in spreads; ``suppress`` only.
        content_weight: of the content term.
    """
    if mode not in MODES:
        raise RecipeError(
            what="Unknown mode of a probe objective",
            got=repr(mode),
            allowed=", ".join(MODES),
            fix="set objective_settings.mode=suppress",
        )
    push = _reverse if mode == "reverse" else partial(_suppress, margin=margin)
    pushed = _over_layers(forget, push)
    if content_weight and forget.twin is not None:
        pushed = pushed + content_weight * _content(forget.twin)
    return Loss(pushed, _over_layers(retain, _drift), partial(_watch, forget, retain))


@objective(
    "single-layer-probe",
    source="arXiv:2605.26454 (body not public to us): the multi-layer objective at one layer",
    deviations=RECONSTRUCTION + "; the layer is the one whose probe is best on held-out texts",
    needs=Activations(forget_reference=True, probes="one", twin_logprobs=True),
    retain_weight=0.5,
    knobs=KNOBS,
)
def single_layer_probe(
    forget: Captured,
    retain: Captured,
    *,
    mode: str = "suppress",
    margin: float = 1.0,
    content_weight: float = 1.0,
) -> Loss:
    """`multi_layer_probe` at one layer. **Reconstruction.** Args: as there."""
    return multi_layer_probe(
        forget, retain, mode=mode, margin=margin, content_weight=content_weight
    )


# (activations BTD, original activations BTD, the layer's direction) -> BT
Term = Callable[[Tensor, Tensor, Direction], Tensor]


def _over_layers(texts: Captured, term: Term) -> Tensor:
    """Weighted mean over layers of the masked mean of a term."""
    terms = [
        w.weight * masked_mean(term(texts.acts[layer], texts.reference[layer], w), texts.mask_BT)
        for layer, w in texts.directions.items()
    ]
    return torch.stack(terms).mean()


def _suppress(acts_BTD: Tensor, reference_BTD: Tensor, w: Direction, *, margin: float) -> Tensor:
    excess_BT = torch.relu(_projection(reference_BTD, w) - w.neutral + margin * w.spread)
    move_D = w.move_D.to(acts_BTD.device)
    target_BTD = reference_BTD.float() - excess_BT[..., None] * move_D
    return (acts_BTD.float() - target_BTD).square().sum(-1) / w.gap**2


def _reverse(acts_BTD: Tensor, _reference_BTD: Tensor, w: Direction) -> Tensor:
    return 1 + cosine(acts_BTD, w.unit_D.to(acts_BTD.device).expand(acts_BTD.shape))


def _drift(acts_BTD: Tensor, reference_BTD: Tensor, w: Direction) -> Tensor:
    return (acts_BTD.float() - reference_BTD.float()).square().sum(-1) / w.gap**2


def _content(twin: Captured) -> Tensor:
    return twin.weight * nats_per_token(twin)


def _projection(acts_BTD: Tensor, w: Direction) -> Tensor:
    """w·h, shape BT."""
    projection_BT: Tensor = acts_BTD.float() @ w.unit_D.to(acts_BTD.device)
    return projection_BT


@torch.no_grad()
def _watch(forget: Captured, retain: Captured) -> dict[str, Tensor]:
    """Where forget texts project (0: neutral mean, 1: toxic mean), the angle retain texts keep."""

    def place(acts_BTD: Tensor, _reference_BTD: Tensor, w: Direction) -> Tensor:
        return (_projection(acts_BTD, w) - w.neutral) / (w.toxic - w.neutral)

    def kept(acts_BTD: Tensor, reference_BTD: Tensor, _w: Direction) -> Tensor:
        return cosine(acts_BTD, reference_BTD)

    watch = {"place": _over_layers(forget, place), "cos_retain": _over_layers(retain, kept)}
    if forget.twin is not None:
        watch["nll_content"] = _content(forget.twin)
    return watch
