"""One batch through a model: log-probabilities of the rows, with a shared or a whole context.

Shapes: G prompts, B rows (one per answer or text), T tokens, K kept positions, N scored tokens of
a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from expunge.evaluation.prepared import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shares_context(model: PreTrainedModel) -> bool:
    """Whether this architecture's cache can be repeated for several answers to one prompt.

    That takes a pure key-value cache (a recurrent state cannot skip left padding) and explicit
    positions, for prompts of unequal length are padded on the left. Other models score whole
    sequences, padded on the right.
    """
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids"} <= set(parameters) or model._is_stateful:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_logprobs(model: PreTrainedModel, prompts: Sequence[Sequence[Row]]) -> list[float]:
    """Log-probability of each row in nats, prompt after prompt; each prompt is computed once."""
    device = model.device
    shared = [min(row.start for row in rows) for rows in prompts]
    contexts = [rows[0].ids[:length] for rows, length in zip(prompts, shared, strict=True)]
    ids_GT, real_GT = _pad(contexts, device, left=True)
    positions_GT = (real_GT.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits_GKV = _logits(
        model, ids_GT, real_GT, 1, past_key_values=cache, position_ids=positions_GT
    )
    logprobs_GV = logits_GKV[:, -1].float().log_softmax(-1)

    owners, rests, firsts = [], [], []
    for owner, (rows, length) in enumerate(zip(prompts, shared, strict=True)):
        for row in rows:
            owners.append(owner)
            rests.append(row.ids[length:])
            # Another answer's boundary may lie earlier; this row then repeats some of its prompt.
            firsts.append(row.start - length)
    owner_B = torch.tensor(owners, device=device)
    opening_B = torch.tensor([rest[0] for rest in rests], device=device)
    opens_B = torch.tensor(firsts, device=device) == 0
    totals_B = torch.where(opens_B, logprobs_GV[owner_B, opening_B], 0.0).double()

    longer = [at for at, rest in enumerate(rests) if len(rest) > 1]
    if longer:
        longer_B = torch.tensor(longer, device=device)
        cache.batch_select_indices(owner_B[longer_B])
        totals_B[longer_B] += _following(
            model,
            [rests[at] for at in longer],
            [max(firsts[at], 1) for at in longer],
            cache=cache,
            past_real_BT=real_GT[owner_B[longer_B]],
        )
    return [float(total) for total in totals_B.tolist()]


def whole_logprobs(model: PreTrainedModel, rows: Sequence[Row]) -> list[float]:
    """Log-probability of each row in nats, each computed in full."""
    totals_B = _following(model, [row.ids for row in rows], [row.start for row in rows])
    return [float(total) for total in totals_B.tolist()]


def logprobs_after(
    model: PreTrainedModel, rows: Sequence[Row], kept: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of every next token after the positions ``kept`` of each row.

    Returns:
        logprobs_KV for each row, float32 on the model's device.
    """
    ids_BT, real_BT = _pad([row.ids for row in rows], model.device)
    every_T = torch.arange(ids_BT.shape[1], device=model.device)
    logits_BTV = _logits(model, ids_BT, real_BT, every_T)
    return [
        logits_TV[list(positions)].float().log_softmax(-1)
        for logits_TV, positions in zip(logits_BTV, kept, strict=True)
    ]


def _following(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    firsts: Sequence[int],
    *,
    cache: DynamicCache | None = None,
    past_real_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of ``sequence[first:]`` given what precedes it, float64 of shape [B].

    ``first`` ≥ 1; with a cache, the sequences follow the left-padded context that it holds.
    """
    ids_BT, real_BT = _pad(sequences, model.device)
    inputs_BT, mask_BT, extra = ids_BT[:, :-1], real_BT[:, :-1], {}
    columns_T = torch.arange(ids_BT.shape[1], device=model.device)
    if past_real_BT is not None:
        positions_BT = past_real_BT.sum(1, keepdim=True) + columns_T[:-1]
        extra = {"past_key_values": cache, "position_ids": positions_BT}
        mask_BT = torch.cat([past_real_BT, mask_BT], 1)
    first_B = torch.tensor(firsts, device=model.device)
    low = min(firsts)
    logits_BKV = _logits(model, inputs_BT, mask_BT, columns_T[low - 1 : -1], **extra)
    scored_BK = (real_BT & (columns_T >= first_B[:, None]))[:, low:]
    # Only the scored positions are turned to float32: padding and prompts cost no memory there.
    logits_NV = logits_BKV[scored_BK].float()
    targets_N = ids_BT[:, low:][scored_BK]
    logprobs_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(1)
    totals_B = torch.zeros(len(sequences), dtype=torch.float64, device=model.device)
    return totals_B.index_add_(0, scored_BK.nonzero()[:, 0], logprobs_N.double())


def _logits(
    model: PreTrainedModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    keep: int | torch.Tensor,
    **extra: Any,
) -> torch.Tensor:
    """Logits at the last ``keep`` positions, or at the positions ``keep``: [B, K, V]."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long(), **extra}
    inputs["use_cache"] = "past_key_values" in extra
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BKV: torch.Tensor = model(**inputs, logits_to_keep=keep).logits
        return logits_BKV
    logits_BTV: torch.Tensor = model(**inputs).logits
    return logits_BTV[:, -keep:] if isinstance(keep, int) else logits_BTV[:, keep]


def _pad(
    sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask of the real ones, [B, T]. Id 0 pads: masked, so any known id would do."""
    width = max(map(len, sequences))
    ids, real = [], []
    for sequence in sequences:
        gap, ones = [0] * (width - len(sequence)), [True] * len(sequence)
        ids.append([*gap, *sequence] if left else [*sequence, *gap])
        real.append([*gap, *ones] if left else [*ones, *gap])
    return torch.tensor(ids, device=device), torch.tensor(real, dtype=torch.bool, device=device)
