"""Log-likelihood of answers and texts in nats: what the evaluators are made of.

Tokenising (`prepared`) is apart from the forward (`score`): one `Prepared` serves many models.
Answers that share a prompt share its computation: the prompts run once with a
key-value cache, the cache's rows are repeated, and only the answers' tokens follow. A prompt's last
position already scores the first token of every answer, so one-token answers need no second run.

The idea of scoring choices by likelihood follows EleutherAI/lm-evaluation-harness
(``multiple_choice`` tasks, https://github.com/EleutherAI/lm-evaluation-harness).

Shapes: G prompts, B rows (one per answer or text), T tokens, K kept positions, N scored tokens of
a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from expunge.data.text import Text
from expunge.errors import DataError, ResourceError
from expunge.evaluation.prepared import Prepared, Row, prepare, prepare_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scored = tuple[float, int]
"""Total log-probability in nats, and the number of tokens it covers. (0.0, 0): not scored."""

Job = list[tuple[tuple[int, int], Row]]
"""Rows with a common context, each with its place: (group, index within the group)."""

OnProgress = Callable[[int], None]
"""Called after each batch with the number of rows it has finished."""


def score(
    model: PreTrainedModel,
    prepared: Prepared,
    *,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> list[list[Scored]]:
    """Log-probability and token count of each row of each group, in the order prepared.

    Batches hold up to ``batch_size`` rows, longest first, so that a shortage of memory shows at
    once: it halves the batch for the rest of the call. The model's training flags come back as
    they were; log-softmax is computed in float32 whatever the model's dtype.

    Raises:
        DataError: a row is longer than the model's positions.
        ResourceError: out of memory with a single prompt or text in the batch.
    """
    results = [[(0.0, 0)] * len(group) for group in prepared.groups]
    jobs = _jobs(prepared, shared=shares_context(model))
    _check_length(model, jobs)
    if on_progress and (idle := prepared.rows - sum(len(job) for job in jobs)):
        on_progress(idle)
    at = 0
    with _evaluating(model), torch.inference_mode():
        while at < len(jobs):
            batch = _take(jobs[at:], batch_size)
            rows = [row for job in batch for _, row in job]
            try:
                totals = _whole(model, rows) if len(batch) == len(rows) else _shared(model, batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise _out_of_memory(rows, error) from error
                batch_size = len(rows) // 2
                continue
            places = [place for job in batch for place, _ in job]
            for (group, index), row, total in zip(places, rows, totals, strict=True):
                results[group][index] = (total, len(row.ids) - row.start)
            at += len(batch)
            if on_progress:
                on_progress(len(rows))
    return results


def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> list[list[Scored]]:
    """`prepare` and `score`: total nats and token count of each answer given its prompt."""
    prepared = prepare(tokenizer, prompts, answers)
    return score(model, prepared, batch_size=batch_size, on_progress=on_progress)


def text_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    max_tokens: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> list[Scored]:
    """Negative log-likelihood in nats and scored tokens of each text; (0.0, 0): nothing to score."""
    prepared = prepare_texts(tokenizer, texts, max_tokens=max_tokens)
    scored = score(model, prepared, batch_size=batch_size, on_progress=on_progress)
    return [(-total if tokens else 0.0, tokens) for ((total, tokens),) in scored]


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


# --- one batch ---------------------------------------------------------------------------------


def _shared(model: PreTrainedModel, jobs: list[Job]) -> list[float]:
    """Log-probabilities of the rows of ``jobs``; each prompt is computed once."""
    device = model.device
    shared = [min(row.start for _, row in job) for job in jobs]
    contexts = [job[0][1].ids[:length] for job, length in zip(jobs, shared, strict=True)]
    ids_GT, real_GT = _pad(contexts, device, left=True)
    positions_GT = (real_GT.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits_GKV = _logits(
        model, ids_GT, real_GT, 1, past_key_values=cache, position_ids=positions_GT
    )
    logprobs_GV = logits_GKV[:, -1].float().log_softmax(-1)

    owners, rests, firsts = [], [], []
    for owner, (job, length) in enumerate(zip(jobs, shared, strict=True)):
        for _, row in job:
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


def _whole(model: PreTrainedModel, rows: list[Row]) -> list[float]:
    """Log-probabilities of rows without a common prompt, each computed in full."""
    totals_B = _following(model, [row.ids for row in rows], [row.start for row in rows])
    return [float(total) for total in totals_B.tolist()]


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
        return model(**inputs, logits_to_keep=keep).logits
    logits_BTV = model(**inputs).logits
    return logits_BTV[:, -keep:] if isinstance(keep, int) else logits_BTV[:, keep]


# --- batches -----------------------------------------------------------------------------------


def _jobs(prepared: Prepared, *, shared: bool) -> list[Job]:
    """The rows that have something to score, by common context (or one by one), longest first."""
    jobs: list[Job] = []
    for group, rows in enumerate(prepared.groups):
        job = [((group, at), row) for at, row in enumerate(rows) if row.start < len(row.ids)]
        jobs.extend([job] if shared and job else [[placed] for placed in job])
    return sorted(jobs, key=_length, reverse=True)


def _length(job: Job) -> int:
    """Tokens of the first forward: the common context, or the only row."""
    return min(row.start for _, row in job) if len(job) > 1 else len(job[0][1].ids)


def _take(jobs: Sequence[Job], batch_size: int) -> list[Job]:
    """The first jobs with up to ``batch_size`` rows together; at least one job."""
    rows = list(accumulate(len(job) for job in jobs[:batch_size]))
    return list(jobs[: max(1, sum(count <= batch_size for count in rows))])


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


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside the block; afterwards each module's flag as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _check_length(model: PreTrainedModel, jobs: Sequence[Job]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(row.ids) for job in jobs for _, row in job), default=0)
    if limit is not None and longest > limit:
        raise DataError(
            what="A text or a question with its answer is longer than the model can read",
            got=f"{longest} tokens",
            allowed=f"up to {limit} tokens",
            fix="give a smaller max_tokens: texts are cut there, longer questions left unscored",
        )


def _out_of_memory(rows: Sequence[Row], error: Exception) -> ResourceError:
    return ResourceError(
        what="Out of memory while scoring a single prompt or text",
        got=f"{len(rows)} rows of up to {max(len(row.ids) for row in rows)} tokens: {error}",
        allowed="memory for one prompt with its answers at a time",
        fix="lower max_tokens, load the model in bfloat16, or use a larger device",
    )
