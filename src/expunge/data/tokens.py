"""Texts → token ids, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any

from expunge.data.text import Text
from expunge.errors import DataError, ModelError, RecipeError

SHORTEST = 2  # a single token predicts nothing
BUCKET_BATCHES = 16  # batches among which texts are sorted by length


@dataclass(frozen=True)
class Encoded:
    """One text as token ids.

    Attributes:
        ids: token ids with the tokenizer's special tokens, at most ``max_tokens``.
        prompt_tokens: leading tokens that are only context: special ones such as ``<s>`` and those
            wholly inside the prompt. A token across the boundary belongs to the answer.
        truncated: whether tokens were cut off at the end.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    truncated: bool


def encode(texts: Sequence[Text], tokenizer: Any, *, max_tokens: int) -> list[Encoded]:
    """Token ids of each text, in order, one for each; `too_short` names those to leave out.

    Args:
        texts: what to encode.
        tokenizer: a Hugging Face tokenizer. A fast one says which characters a token covers; with
            a slow one the prompt is encoded too, and its tokens are those that both share.
        max_tokens: longest result, in tokens; what lies beyond is cut off.

    Raises:
        RecipeError: ``max_tokens`` is below 2.
    """
    if max_tokens < SHORTEST:
        raise RecipeError(
            what="max_tokens is out of range",
            got=str(max_tokens),
            allowed=f"a whole number from {SHORTEST}",
            fix="use 256 or 512",
        )
    if not texts:
        return []
    fast = bool(tokenizer.is_fast)
    every_ids, offsets = _tokenise([text.text for text in texts], tokenizer, offsets=fast)
    if fast:
        pairs = zip(texts, offsets, strict=True)
        prompts = [_before(text.prompt_chars, spans) for text, spans in pairs]
    else:
        alone, _ = _tokenise(
            [text.text[: text.prompt_chars] for text in texts], tokenizer, offsets=False
        )
        prompts = [_shared(prompt, ids) for prompt, ids in zip(alone, every_ids, strict=True)]
    return [
        Encoded(tuple(ids[:max_tokens]), min(prompt, max_tokens), len(ids) > max_tokens)
        for ids, prompt in zip(every_ids, prompts, strict=True)
    ]


def too_short(encoded: Sequence[Encoded]) -> dict[int, str]:
    """Index → reason of the texts that nothing can be learned from or measured on."""
    reasons: dict[int, str] = {}
    for index, one in enumerate(encoded):
        if len(one.ids) < SHORTEST:
            reasons[index] = f"fewer than {SHORTEST} tokens"
        elif one.prompt_tokens >= len(one.ids):
            cut = " (cut off at max_tokens)" if one.truncated else ""
            reasons[index] = f"no token after the prompt{cut}"
    return reasons


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise ModelError where the tokenizer has ids that a model of ``vocab_size`` ids lacks."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= vocab_size:
        raise ModelError(
            what="The tokenizer does not belong to this model",
            got=f"token {token!r} with id {largest}, and a model of {vocab_size} ids",
            allowed=f"ids from 0 to {vocab_size - 1}",
            fix="use the tokenizer from the model's own directory; if tokens were added to it, "
            "resize the model's embeddings and save both",
        )


def training_batches(
    n_texts: int, *, batch_size: int, seed: int, lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    """The batches of one epoch, as tuples of text indices; the same for the same arguments.

    Texts are shuffled, sorted by length among each 16 batches so that little is padding, and the
    batches are shuffled again. What does not fill a batch is left out, a random few of the texts;
    fewer texts than one batch make one short batch.

    Args:
        n_texts: how many texts there are.
        batch_size: texts in a batch.
        seed: give another one for each epoch.
        lengths: tokens in each text.

    Raises:
        DataError: there are no texts.
        RecipeError: ``batch_size`` is below 1.
        ValueError: ``lengths`` are not ``n_texts``.
    """
    if batch_size < 1:
        raise RecipeError(
            what="batch_size is out of range",
            got=str(batch_size),
            allowed="a whole number from 1",
            fix="use 4 or 8, and fewer where memory is short",
        )
    if len(lengths) != n_texts:
        raise ValueError(f"{len(lengths)} lengths for {n_texts} texts")
    if n_texts == 0:
        raise DataError(
            what="There is nothing to train on",
            got="0 texts",
            allowed="at least one text",
            fix="check the sizes of the splits, and max_tokens",
        )
    random = Random(seed)
    order = random.sample(range(n_texts), n_texts)
    # Cut before sorting: afterwards the longest texts would be left out.
    order = order[: max(n_texts - n_texts % batch_size, min(batch_size, n_texts))]
    bucket = BUCKET_BATCHES * batch_size
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), bucket):
        alike = sorted(order[start : start + bucket], key=lambda index: lengths[index])
        batches += [
            tuple(alike[place : place + batch_size]) for place in range(0, len(alike), batch_size)
        ]
    random.shuffle(batches)
    return batches


def _tokenise(
    texts: list[str], tokenizer: Any, *, offsets: bool
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Ids and character spans of each text, uncut: the caller sees what it cuts."""
    result = tokenizer(
        texts, truncation=False, padding=False, return_offsets_mapping=offsets, verbose=False
    )
    return result["input_ids"], result["offset_mapping"] if offsets else []


def _before(chars: int, spans: list[tuple[int, int]]) -> int:
    """How many leading tokens end within the first ``chars`` characters."""
    return next((place for place, (_, end) in enumerate(spans) if end > chars), len(spans))


def _shared(prompt: list[int], ids: list[int]) -> int:
    """How many leading ids the prompt alone has in common with the whole text."""
    pairs = zip(prompt, ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
