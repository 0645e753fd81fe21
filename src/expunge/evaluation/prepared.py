"""Texts and answers as token ids, made once and scored for many models by `likelihood.score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.data.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One token sequence; the tokens from index ``start`` on are scored (``start`` ≥ 1)."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Prepared:
    """Tokenised data: rows in groups; the rows of a group are answers to the same prompt."""

    groups: tuple[tuple[Row, ...], ...]

    @property
    def rows(self) -> int:
        """Rows in all: the total that the `OnProgress` counts of one `score` add up to."""
        return sum(len(group) for group in self.groups)


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    max_tokens: int | None = None,
) -> Prepared:
    """Tokenise ``prompt + " " + answer`` for each answer of each prompt.

    Where the tokenizer merges characters across the boundary, the prompt's own tokens do not open
    the whole: the longest common beginning is then the context, and the rest is scored. Special
    tokens are those the tokenizer adds by itself. A whole of more than ``max_tokens`` tokens is
    left unscored, for a cut answer is another answer.
    """
    contexts = _tokenise(tokenizer, prompts)
    pairs = list(zip(prompts, answers, strict=True))
    wholes = _tokenise(tokenizer, [f"{prompt} {one}" for prompt, given in pairs for one in given])
    groups, at = [], 0
    for context, given in zip(contexts, answers, strict=True):
        rows = [_row(context, whole) for whole in wholes[at : at + len(given)]]
        if max_tokens is not None:
            rows = [row if len(row.ids) <= max_tokens else Row((), 1) for row in rows]
        groups.append(tuple(rows))
        at += len(given)
    return Prepared(tuple(groups))


def prepare_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], *, max_tokens: int
) -> Prepared:
    """Tokenise texts, one group each; what follows ``max_tokens`` tokens is cut off.

    The tokens after the first ``prompt_chars`` characters are scored, by the boundary rule of
    `prepare`. The first token of a sequence (BOS, as a rule) is never scored.
    """
    contexts = _tokenise(tokenizer, [text.text[: text.prompt_chars] for text in texts])
    wholes = _tokenise(tokenizer, [text.text for text in texts])
    pairs = zip(contexts, wholes, strict=True)
    return Prepared(tuple((_row(context, whole[:max_tokens]),) for context, whole in pairs))


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; fast tokenizers refuse an empty batch."""
    return list(tokenizer(list(texts))["input_ids"]) if texts else []


def _row(context: Sequence[int], whole: Sequence[int]) -> Row:
    """The row of ``whole``, scored from where it leaves ``context``, but never its first token."""
    pairs = enumerate(zip(context, whole, strict=False))
    common = next((at for at, (one, other) in pairs if one != other), min(len(context), len(whole)))
    return Row(tuple(whole), max(common, 1))
