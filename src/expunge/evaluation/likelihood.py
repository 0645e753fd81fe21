"""Log-likelihood of answers and texts in nats: what the evaluators are made of.

Tokenising (`prepared`) is apart from the forward (`score`): one `Prepared` serves many models.
Answers that share a prompt share its computation: the prompts run once with a key-value cache, the
cache's rows are repeated, and only the answers' tokens follow. A prompt's last position already
scores the first token of every answer, so one-token answers need no second run.

The idea of scoring choices by likelihood follows EleutherAI/lm-evaluation-harness
(``multiple_choice`` tasks, https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from expunge.data.text import Text
from expunge.errors import DataError, ResourceError
from expunge.evaluation.forward import shared_logprobs, shares_context, whole_logprobs
from expunge.evaluation.prepared import Prepared, Row, prepare, prepare_texts
from expunge.model.memory import is_out_of_memory

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
    batch_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[list[Scored]]:
    """Log-probability and token count of each row of each group, in the order prepared.

    Batches hold up to ``batch_size`` rows and ``batch_tokens`` tokens (rows times the longest, a
    prompt counted for each of its answers), but never part answers that share their prompt's
    computation. The longest come first, so that a shortage of memory shows at once: it halves the
    rows of a batch for the rest of the call. The model's training flags come back as they were;
    log-softmax is computed in float32 whatever the model's dtype.

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
    with evaluating(model), torch.inference_mode():
        while at < len(jobs):
            batch = _take(jobs[at:], batch_size, batch_tokens)
            places = [place for job in batch for place, _ in job]
            rows = [row for job in batch for _, row in job]
            try:
                if len(batch) == len(rows):
                    totals = whole_logprobs(model, rows)
                else:
                    totals = shared_logprobs(model, [[row for _, row in job] for job in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise _out_of_memory(rows, error) from error
                batch_size = len(rows) // 2
                continue
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
    """Nats (negative log-likelihood) and scored tokens of each text; (0.0, 0): nothing to score."""
    prepared = prepare_texts(tokenizer, texts, max_tokens=max_tokens)
    scored = score(model, prepared, batch_size=batch_size, on_progress=on_progress)
    return [(-total if tokens else 0.0, tokens) for ((total, tokens),) in scored]


def _jobs(prepared: Prepared, *, shared: bool) -> list[Job]:
    """The rows that have something to score, by common context (or one by one), longest first."""
    jobs: list[Job] = []
    for group, rows in enumerate(prepared.groups):
        job = [((group, at), row) for at, row in enumerate(rows) if row.start < len(row.ids)]
        jobs.extend([job] if shared and job else [[placed] for placed in job])
    return sorted(jobs, key=_length, reverse=True)


def _length(job: Job) -> int:
    """Tokens of the longest row, so that rows of a batch are padded little."""
    return max(len(row.ids) for _, row in job)


def _take(jobs: Sequence[Job], batch_size: int, batch_tokens: int | None) -> list[Job]:
    """The first jobs with up to ``batch_size`` rows and ``batch_tokens`` tokens; at least one."""
    if batch_tokens is not None:
        batch_size = min(batch_size, batch_tokens // _length(jobs[0]))
    rows = list(accumulate(len(job) for job in jobs[:batch_size]))
    return list(jobs[: max(1, sum(count <= batch_size for count in rows))])


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
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
