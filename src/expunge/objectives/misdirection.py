"""Misdirection: steer the activations of forget texts toward a random direction.

h is the activation after a layer, h0 the original model's, u the unit target direction. Means are
over tokens that count and over the layers read. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.masked import masked_mean
from expunge.objectives.base import Activations, Captured, Knob, Loss, mean_over_layers, objective
from expunge.objectives.retain import angle, cosine, squared_error

_ADAPTIVE_SCALES = ("per-sample", "first-batch")
# Squared errors are in units of the activations, so the published weight means something else in
# another model: the demo's, set by hand, are a 240th and a 60th of it.
_RETAIN_KNOB = Knob("retain_weight", 0.001, 10.0, relative=True)


@objective(
    "rmu",
    source="arXiv:2403.03218 v7; repository centerforaisafety/wmdp",
    deviations="the rate decays linearly to zero (lr_schedule=constant is the source's); no weight "
    "decay unless weight_decay says so; the forget term leaves out the first token "
    "(first_token=both counts it)",
    needs=Activations(),
    retain_weight=1200.0,
    # Published coefficients span a factor of 70 between models.
    knobs=(Knob("coefficient", 0.2, 20.0, relative=True), _RETAIN_KNOB),
)
def rmu(forget: Captured, retain: Captured, *, coefficient: float = 6.5) -> Loss:
    """Representation misdirection: mean (h − c·u)², and mean (h − h0)² on retain texts.

    Args:
        forget: activations of forget texts, with targets.
        retain: activations of retain texts, with reference.
        coefficient: c, the target's norm in activation units. 6.5 is Zephyr-7B's; it follows the
            model's activation norm (45 for Llama-3.1-8B, 300 for Yi-34B), so it does not transfer.
    """
    return Loss(
        _steer(forget, {layer: coefficient for layer in forget.acts}),
        squared_error(retain),
        partial(_watch, forget, retain),
    )


@objective(
    "adaptive-rmu",
    source="arXiv:2408.06223 v2 and its repository",
    deviations="scale per-sample uses the mean token norm of each text; first-batch (the "
    "repository's way) the mean norm over the first forget batch",
    needs=Activations(forget_reference=True),
    retain_weight=1200.0,
    knobs=(Knob("beta", 1.0, 20.0), _RETAIN_KNOB),
)
def adaptive_rmu(
    forget: Captured, retain: Captured, *, beta: float = 5.0, scale: str = "per-sample"
) -> Loss:
    """RMU whose target norm is β times the original activations' norm.

    Args:
        forget: activations of forget texts, with reference and targets.
        retain: activations of retain texts, with reference.
        beta: multiple of the original norm.
        scale: ``per-sample`` (the paper) or ``first-batch`` (its code).
    """
    if scale not in _ADAPTIVE_SCALES:
        raise RecipeError(
            what="Unknown scale for adaptive-rmu",
            got=repr(scale),
            allowed=", ".join(_ADAPTIVE_SCALES),
            fix="set objective_settings.scale=per-sample",
        )
    if scale == "first-batch":
        norms: dict[int, Tensor | float] = {k: beta * forget.first_norm[k] for k in forget.acts}
    else:
        norms = {
            layer: beta * _sample_norm(h0_BTD, forget.mask_BT)
            for layer, h0_BTD in forget.reference.items()
        }
    return Loss(_steer(forget, norms), squared_error(retain), partial(_watch, forget, retain))


@objective(
    "cosine-rmu",
    source="arXiv:2605.26454 (body not public to us)",
    deviations="a reconstruction: the paper is known to use a cosine-based variant of RMU; the "
    "formula, the retain angle and the optional norm terms are ours",
    needs=Activations(reference_settings=("norm_weight",)),
    retain_weight=5.0,
    target="centered",
)
def cosine_rmu(
    forget: Captured,
    retain: Captured,
    *,
    norm_weight: float = 0.0,
    norm_target: float = 1.0,
    retain_norm_weight: float = 0.0,
) -> Loss:
    """Scale-free RMU: 1 − cos(h, u), and 1 − cos(h, h0) on retain texts. **Reconstruction.**

    Angles need no steering coefficient, so nothing has to be retuned for a model whose
    activations are larger. An angle alone puts no force on the norm, which RMU's authors hold to
    be part of its effect; two optional terms add one.

    Args:
        forget: activations of forget texts, with targets, and for ``norm_weight`` with reference.
        retain: activations of retain texts, with reference.
        norm_weight: weight of (‖h‖/‖h0‖ − norm_target)² on forget texts.
        norm_target: wanted ratio of norms on forget texts.
        retain_norm_weight: weight of (‖h‖/‖h0‖ − 1)² on retain texts.
    """
    forget_loss = mean_over_layers(
        [
            masked_mean(1 - cosine(acts, _like(forget.target[layer], acts)), forget.mask_BT)
            for layer, acts in forget.acts.items()
        ]
    )
    if norm_weight:
        forget_loss = forget_loss + norm_weight * _norm_error(forget, norm_target)
    retain_loss = angle(retain)
    if retain_norm_weight:
        retain_loss = retain_loss + retain_norm_weight * _norm_error(retain, 1.0)
    return Loss(forget_loss, retain_loss, partial(_watch, forget, retain))


def _steer(forget: Captured, norms: dict[int, float] | dict[int, Tensor | float]) -> Tensor:
    """Mean over tokens and dimensions of (h − norm·u)², averaged over layers."""
    return mean_over_layers(
        [
            masked_mean(
                (acts.float() - norms[layer] * _like(forget.target[layer], acts)).square().mean(-1),
                forget.mask_BT,
            )
            for layer, acts in forget.acts.items()
        ]
    )


def _sample_norm(acts_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean token norm of each text, shape B11."""
    norms_BT = torch.where(mask_BT, acts_BTD.float().norm(dim=-1), 0.0)
    counts_B11 = mask_BT.sum(-1).clamp(min=1)[:, None, None]
    means_B11: Tensor = norms_BT.sum(-1)[:, None, None] / counts_B11
    return means_B11


def _like(target: Tensor, acts_BTD: Tensor) -> Tensor:
    """A target of shape D or BTD, in full BTD. Raises ValueError for any other shape."""
    if target.shape not in (acts_BTD.shape[-1:], acts_BTD.shape):
        # A target BD would broadcast along the tokens, unseen where B = T.
        raise ValueError(f"target {tuple(target.shape)} for activations {tuple(acts_BTD.shape)}")
    return target.float().expand(acts_BTD.shape)


def _norm_error(batch: Captured, wanted: float) -> Tensor:
    return mean_over_layers(
        [
            masked_mean(
                (_norm_ratio(acts, batch.reference[layer]) - wanted).square(), batch.mask_BT
            )
            for layer, acts in batch.acts.items()
        ]
    )


def _norm_ratio(acts_BTD: Tensor, reference_BTD: Tensor) -> Tensor:
    reference_BT = reference_BTD.float().norm(dim=-1).clamp(min=1e-6)
    ratio_BT: Tensor = acts_BTD.float().norm(dim=-1) / reference_BT
    return ratio_BT


@torch.no_grad()
def _watch(forget: Captured, retain: Captured) -> dict[str, Tensor]:
    """At the deepest layer: cos(h, u) and ‖h‖ on forget texts, cos(h, h0) on retain texts."""
    layer = max(forget.acts)
    acts = forget.acts[layer]
    return {
        "cos_target": masked_mean(cosine(acts, _like(forget.target[layer], acts)), forget.mask_BT),
        "norm_forget": masked_mean(acts.float().norm(dim=-1), forget.mask_BT),
        "cos_retain": masked_mean(
            cosine(retain.acts[layer], retain.reference[layer]), retain.mask_BT
        ),
    }
