"""Continuations of prompts, sampled in batches with a key-value cache.

    sampled = continuations(model, tokenizer, prompts, Sampling(samples=5, new_tokens=20))
    sampled[0][2].text     # the third continuation of the first prompt

Sampling is Gumbel-max: the next token is the argmax of logits / temperature plus Gumbel noise,
which draws from the softmax exactly. The noise belongs to (seed, prompt, sample, step, token), so
a continuation depends on neither batches nor device beyond float rounding, and two models
that are given the same prompts share their noise: where their logits agree, so do their texts.

Sampled text may be vile. Nothing here prints it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.errors import DataError
from expunge.evaluation.forward import shares_context
from expunge.evaluation.likelihood import OnProgress, evaluating
from expunge.model.memory import halving_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    Attributes:
        samples: continuations for each prompt.
        new_tokens: tokens in a continuation, at most.
        temperature: divides the logits; 0: the likeliest token each time, all samples alike.
        seed: of the noise.
        batch_size: rows in one forward.
    """

    samples: int = 5
    new_tokens: int = 20
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64


SAMPLING = Sampling()


@dataclass(frozen=True)
class Continuation:
    """One sampled continuation.

    Attributes:
        prompt_ids: the prompt's tokens, special ones included.
        ids: the sampled tokens, with the end token where the model chose to end.
        text: ``ids`` as text, without special tokens.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str

    @property
    def empty(self) -> bool:
        """Whether there is nothing to judge: no character but white space."""
        return not self.text.strip()


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    on_progress: OnProgress | None = None,
) -> tuple[tuple[Continuation, ...], ...]:
    """``sampling.samples`` continuations of each prompt, in order.

    Of the model's ``generation_config`` only the end tokens and ``bad_words_ids`` (a decoding
    filter) are honoured. Its top_k, top_p, temperature, penalties and lengths are not: models
    differ in them, and the same sampling for all is what makes their texts comparable.
    Out of memory halves the batch. ``on_progress`` is told of rows, a row being a continuation.

    Raises:
        DataError: a prompt has no token, or leaves no room in the context for the new ones.
        ResourceError: out of memory with a single row.
    """
    encoded = _encode(tokenizer, prompts)
    _check_lengths(model.config.get_text_config(), encoded, sampling.new_tokens)
    greedy = sampling.temperature == 0
    samples = min(1, sampling.samples) if greedy else sampling.samples
    jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)]
    jobs.sort(key=lambda job: -len(encoded[job[0]]))  # longest first: a shortage shows at once
    ends = _end_tokens(model, tokenizer)
    pads = shares_context(model)
    made: dict[tuple[int, int], Continuation] = {}

    def work(low: int, high: int) -> None:
        batch = jobs[low:high]
        # A recurrent state cannot skip padding, so there only prompts of one length go together.
        equal = [list(same) for _, same in groupby(batch, lambda job: len(encoded[job[0]]))]
        for rows in [batch] if pads else equal:
            noise = None if greedy else _Noise(rows, sampling)
            sampled = _generate(
                model, [encoded[prompt] for prompt, _ in rows], sampling.new_tokens, ends, noise
            )
            for (prompt, sample), ids in zip(rows, sampled, strict=True):
                text = _text(tokenizer, encoded[prompt], ids)
                made[prompt, sample] = Continuation(tuple(encoded[prompt]), tuple(ids), text)
        if on_progress:
            on_progress(len(batch) * (sampling.samples if greedy else 1))

    with evaluating(model), _plain_settings(model, ends):
        halving_rows(len(jobs), work, what="sampling continuations", size=sampling.batch_size)
    return tuple(
        tuple(made[prompt, 0 if greedy else sample] for sample in range(sampling.samples))
        for prompt in range(len(prompts))
    )


class _Noise:
    """A logits processor: logits / temperature + Gumbel noise, each row from a stream of its own.

    Called once a step. −log of a standard exponential is a Gumbel; it is drawn in float64, for
    float32's coarse steps near 0 would make a rare token win far too often.
    """

    def __init__(self, rows: Sequence[tuple[int, int]], sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.streams = [np.random.default_rng([sampling.seed, *row]) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        size = scores.shape[1]
        drawn_BV = np.empty((len(self.streams), size), dtype=np.float32)
        for row, stream in enumerate(self.streams):
            drawn_BV[row] = stream.standard_exponential(size)
        gumbel_BV = -torch.from_numpy(drawn_BV).to(scores.device).log()
        return scores.float() / self.temperature + gumbel_BV


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    noise: _Noise | None,
) -> list[list[int]]:
    """The new ids of each row, up to and including the first end token."""
    width = max(map(len, prompts))
    gaps = [[0] * (width - len(ids)) for ids in prompts]  # masked, so any known id would do
    ids_BT = torch.tensor([[*gap, *ids] for gap, ids in zip(gaps, prompts, strict=True)])
    mask_BT = torch.tensor(
        [[*gap, *[1] * len(ids)] for gap, ids in zip(gaps, prompts, strict=True)]
    )
    whole_BT: torch.Tensor = model.generate(  # type: ignore[operator,unused-ignore]
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=new_tokens,
        logits_processor=[noise] if noise else None,
    )
    return [_until(row, ends) for row in whole_BT[:, width:].tolist()]


def _until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """``ids`` up to and including the first end token: what follows it is padding."""
    at = next((at for at, one in enumerate(ids) if one in ends), len(ids))
    return list(ids[: at + 1])


@contextmanager
def _plain_settings(model: PreTrainedModel, ends: Sequence[int]) -> Iterator[None]:
    """Greedy decoding with a cache inside the block; the model's own settings come back.

    ``generate`` fills what a given config leaves open from the model's own config, so that is
    what has to be replaced. Greedy, because the noise is already in the scores.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        bad_words_ids=getattr(own, "bad_words_ids", None),
    )
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text, by the model's generation settings, else by the tokenizer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if own is None else own
    return [ends] if isinstance(ends, int) else list(ends or [])


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; an end token that the tokenizer appends would end it: left out."""
    if not prompts:
        return []  # fast tokenizers refuse an empty batch
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids[:-1] if ids and ids[-1] == end else list(ids) for ids in encoded]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What the new ids add to the prompt's text: alone, some tokenizers drop a first space."""

    def decoded(given: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(given), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    before, whole = decoded(prompt), decoded([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else decoded(ids)


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], config: Any, new_tokens: int
) -> None:
    """Raise DataError for prompts that a model with this text config cannot continue."""
    _check_lengths(config, _encode(tokenizer, prompts), new_tokens)


def _check_lengths(config: Any, encoded: Sequence[Sequence[int]], new_tokens: int) -> None:
    if not all(encoded):
        raise DataError(
            what="A prompt has no token, so there is nothing to continue",
            got=f"{sum(not ids for ids in encoded)} of {len(encoded)} prompts without a token",
            allowed="prompts of at least one token",
            fix="leave the empty prompts out",
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return
    too_long = [len(ids) for ids in encoded if len(ids) + new_tokens > limit]
    if too_long:
        raise DataError(
            what="Prompts are too long for the model's context",
            got=f"{len(too_long)} of {len(encoded)} prompts, the longest of {max(too_long)} "
            f"tokens, and {new_tokens} new ones",
            allowed=f"prompts of up to {limit - new_tokens} tokens, for a context of {limit}",
            fix="shorten or leave out these prompts, or sample fewer new tokens",
        )
