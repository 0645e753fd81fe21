"""ProFS: project the toxic subspace out of the late layers' MLP output projections.

Shapes: B batch, T tokens, N pairs, D hidden size, I projection input, K rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from expunge.edits.base import EditInputs, Weights, edit
from expunge.errors import DataError, RecipeError
from expunge.model.structure import Structure
from expunge.probes.stream import stream


@edit(
    "profs",
    source="arXiv:2405.13967 v5; repository Uppaal/detox-edit",
    deviations="embeddings are means over real tokens without the first, where the code counts "
    "padding; the mean neutral embedding is removed, where the code takes the first singular "
    "vector of the neutral ones; the upper half of the layers instead of a range for each model; "
    "pairs are taken evenly instead of at random; where a norm follows the projection (Gemma, "
    "OLMo 2) its gain is allowed for, so that the subspace leaves the residual stream",
    choices={"rank": (1, 2, 4, 8, 16, 32), "first_layer": (-1, 0)},
)
@torch.no_grad()
def profs(given: EditInputs, *, rank: int = 2, first_layer: int = -1, pairs: int = 500) -> Weights:
    """W ← (I − P)W for the MLP output projection of each layer from ``first_layer`` on.

    P projects on the ``rank`` first right singular vectors of the paired differences of pooled
    activations after that layer, toxic minus neutral, from which the direction of the mean
    neutral embedding is removed first. Biases stay.

    Args:
        given: needs pairs.
        rank: dimensions removed in each layer.
        first_layer: 0-based; -1: the upper half of the layers.
        pairs: how many pairs are read at most, evenly from all.

    Returns:
        The new weights, by their names in ``given.model``, in its dtype, on the CPU.

    Raises:
        DataError: texts are not paired, or differ in fewer directions than ``rank``.
        RecipeError: a setting is out of range.
    """
    structure = given.structure
    layers = _layers(structure, first_layer)
    _check(given, rank, pairs)
    chosen = _evenly(len(given.toxic), pairs)
    toxic = _pooled(given, [given.toxic[i] for i in chosen], layers)
    neutral = _pooled(given, [given.neutral[i] for i in chosen], layers)
    weights = {}
    for layer in layers:
        basis_DK = toxic_basis(toxic[layer], neutral[layer], rank)
        if basis_DK is None:
            raise DataError(
                what=f"The pairs differ in too few directions after layer {layer}",
                got=f"{len(chosen)} pairs and fewer than {rank} independent differences",
                allowed="more pairs of different content than the rank",
                fix="give more pairs, or lower rank",
            )
        basis_DK = _before_tail(structure, layer, basis_DK)
        module = structure.projection_of(layer)
        weight = module.get_parameter("weight")
        # GPT-2's Conv1D holds the transpose: its outputs are columns.
        turned = isinstance(module, Conv1D)
        edited = without(weight.T if turned else weight, basis_DK)
        edited = edited.T if turned else edited
        weights[structure.weight_name(layer)] = edited.to("cpu", weight.dtype).contiguous()
    return weights


def toxic_basis(toxic_ND: Tensor, neutral_ND: Tensor, rank: int) -> Tensor | None:
    """The orthonormal basis DK of what tells paired embeddings apart, besides the neutral mean.

    None if the differences span fewer than ``rank`` directions.
    """
    mean_D = torch.nn.functional.normalize(neutral_ND.mean(0), dim=0)
    gaps_ND = toxic_ND - neutral_ND
    rest_ND = gaps_ND - (gaps_ND @ mean_D)[:, None] * mean_D
    _, sizes, rows_KD = torch.linalg.svd(rest_ND, full_matrices=False)
    noise = gaps_ND.norm() * 1e-6  # what rounding leaves of a difference that is none
    if len(sizes) < rank or sizes[rank - 1] <= noise:
        return None
    basis_DK: Tensor = rows_KD[:rank].T
    return basis_DK


def without(weight_DI: Tensor, basis_DK: Tensor) -> Tensor:
    """(I − P)W in float32, P the projection on an orthonormal basis."""
    wide_DI = weight_DI.float()
    basis_DK = basis_DK.to(wide_DI)
    return wide_DI - basis_DK @ (basis_DK.T @ wide_DI)


def _before_tail(structure: Structure, layer: int, basis_DK: Tensor) -> Tensor:
    """The basis of what must leave the product so that ``basis_DK`` leaves the residual stream.

    A norm after the projection gives g·z/‖z‖, and vᵀ(g·z) = (g·v)ᵀz: there, g·v has to go. Of a
    vector of ones an RMS norm gives its gain g.
    """
    parts = [structure.layers[layer].get_submodule(name) for name in structure.tail]
    gains = [part for part in parts if not isinstance(part, nn.Dropout)]
    if not gains:
        return basis_DK
    gain_D = torch.ones_like(basis_DK[:, 0], device=next(gains[0].parameters()).device)
    for part in gains:
        gain_D = part(gain_D)
    basis_DK, _ = torch.linalg.qr(gain_D.float().cpu()[:, None] * basis_DK)
    return basis_DK


def _pooled(
    given: EditInputs, texts: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Layer -> mean activation over each text's tokens, ND, float32, on the CPU."""
    width = given.structure.hidden_size
    pooled = {layer: torch.zeros(len(texts), width) for layer in layers}
    for part in stream(given.model, given.structure, texts, layers):
        counts_B1 = part.mask_BT.sum(1, keepdim=True)
        for layer, acts_BTD in part.acts.items():
            kept_BTD = torch.where(part.mask_BT[..., None], acts_BTD.float(), 0)
            pooled[layer][list(part.indices)] = (kept_BTD.sum(1) / counts_B1).cpu()
    return pooled


def _layers(structure: Structure, first: int) -> list[int]:
    last = structure.n_layers - 1
    if not -1 <= first <= last:
        raise RecipeError(
            what="first_layer of profs is no layer of this model",
            got=str(first),
            allowed=f"0 to {last}, or -1 for the upper half",
            fix="leave first_layer out, or choose a layer that the model has",
        )
    return list(range(structure.n_layers // 2 if first == -1 else first, structure.n_layers))


def _check(given: EditInputs, rank: int, pairs: int) -> None:
    width = given.structure.hidden_size
    for key, value, most in (("rank", rank, width - 1), ("pairs", pairs, math.inf)):
        if not 1 <= value <= most:
            raise RecipeError(
                what=f"{key} of profs is out of range",
                got=str(value),
                allowed=f"a whole number from 1 to {most}" if most < math.inf else "1 or more",
                fix=f"leave {key} out, or use the published 2 (rank) and 500 (pairs)",
            )
    if not given.paired or not given.toxic or len(given.toxic) != len(given.neutral):
        raise DataError(
            what="profs needs pairs: two wordings of one content",
            got=f"{len(given.toxic)} toxic and {len(given.neutral)} neutral texts"
            + ("" if given.paired else ", not paired"),
            allowed="a neutral wording for each toxic one",
            fix="give --pairs, for knowledge --set refusals=FILE, or choose an edit that needs no "
            "pairs, such as project-out",
        )


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` indices, evenly from ``count``."""
    kept = min(count, most)
    return [index * count // kept for index in range(kept)]
