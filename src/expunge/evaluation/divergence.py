"""KL(base ‖ model) on running text, by log-probabilities that outlive the model.

    of_base = next_logprobs(base, prepared, batch_size=16)      # each while its weights are there
    of_model = next_logprobs(model, prepared, batch_size=16)
    divergence(of_base, of_model)

They are kept as float16 and normalised again before use, so a divergence is never below 0 and
that of a model from itself is exactly 0. Rounding adds less than 1e-4 nats/token on the miniature.

Shapes: K kept positions of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import kl_div

from expunge.evaluation.forward import logprobs_after
from expunge.evaluation.likelihood import OnProgress, evaluating
from expunge.evaluation.prepared import Prepared
from expunge.model.memory import halving_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMIT_BYTES = 256 << 20
LOWEST = -6e4  # float16 reaches −65,504


def next_logprobs(
    model: PreTrainedModel,
    prepared: Prepared,
    *,
    batch_size: int,
    limit_bytes: int = LIMIT_BYTES,
    on_progress: OnProgress | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Log-probabilities of the next token over the whole vocabulary, for the first row of groups.

    Positions are those before a scored token. So that all results fit ``limit_bytes``, each text
    keeps an equal number at most, evenly spread; where not even one a text fits, later texts keep
    none.

    Returns:
        logprobs_KV in float16 on the CPU for each group; None where no position is kept.
    """
    rows = [group[0] for group in prepared.groups]
    size = model.config.get_text_config().vocab_size
    kept = _kept([(row.start, len(row.ids)) for row in rows], limit_bytes // (2 * size))
    order = sorted((at for at, own in enumerate(kept) if own), key=lambda at: -len(rows[at].ids))
    results: list[torch.Tensor | None] = [None] * len(rows)

    def work(low: int, high: int) -> None:
        batch = order[low:high]
        found = logprobs_after(model, [rows[at] for at in batch], [kept[at] for at in batch])
        for at, logprobs_KV in zip(batch, found, strict=True):
            results[at] = logprobs_KV.clamp(min=LOWEST).half().cpu()
        if on_progress:
            on_progress(len(batch))

    if on_progress and len(order) < len(rows):
        on_progress(len(rows) - len(order))
    with evaluating(model), torch.inference_mode():
        halving_rows(len(order), work, what="comparing next-token predictions", size=batch_size)
    return tuple(results)


def divergence(
    of_base: Sequence[torch.Tensor | None], of_model: Sequence[torch.Tensor | None]
) -> list[tuple[float, int] | None]:
    """KL(base ‖ model) in nats/token of each text, and the kept positions behind it.

    It asks what the base would say and how far the model is from saying it, so it grows without
    bound where the model rules out what the base expects. None for a text without kept positions,
    and where the two have vocabularies of different sizes.
    """
    return [_one(base, model) for base, model in zip(of_base, of_model, strict=True)]


def _one(base: torch.Tensor | None, model: torch.Tensor | None) -> tuple[float, int] | None:
    if base is None or model is None or base.shape != model.shape:
        return None
    base_KV, model_KV = base.float().log_softmax(-1), model.float().log_softmax(-1)
    total = float(kl_div(model_KV, base_KV, reduction="sum", log_target=True))
    return max(0.0, total / len(base_KV)), len(base_KV)


def _kept(spans: Sequence[tuple[int, int]], room: int) -> list[tuple[int, ...]]:
    """Positions before the scored tokens ``start`` … ``end`` − 1, evenly spread in each text."""
    full = [at for at, (start, end) in enumerate(spans) if start < end]
    share = max(1, room // max(1, len(full)))
    taken = set(full[: max(1, room)])
    kept = []
    for at, (start, end) in enumerate(spans):
        count = min(share, end - start) if at in taken else 0
        kept.append(tuple(start - 1 + i * (end - start) // count for i in range(count)))
    return kept
