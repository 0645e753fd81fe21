"""Banned words: sampling may not complete any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.edits.base import EditInputs, Intervention, edit
from expunge.errors import DataError, ModelError, PatchError

# Where a word can stand: first of all, after a word, on a new line, after a quotation mark.
CONTEXTS = (("", ""), ("x", "x "), ("\n", "\n"), ('"', '"'))


@dataclass(frozen=True)
class BannedWords(Intervention):
    """Token sequences that `generate` may not complete.

    Attributes:
        words: what they spell, casefolded.
        ids: the sequences, each without special tokens.
    """

    name = "banned-words"

    words: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """See `Intervention.applied`; bans that the generation config has already stay."""
        config = getattr(model, "generation_config", None)
        if config is None:
            raise ModelError(
                what="Words can be banned only where text is sampled",
                got=f"{type(model).__name__} without a generation config",
                allowed="a causal language model with its head",
                fix="open the model whole, by AutoModelForCausalLM",
            )
        largest = max(max(ids) for ids in self.ids)
        size = model.get_input_embeddings().weight.shape[0]
        if largest >= size:
            raise PatchError(
                what="The banned words were tokenised for another model",
                got=f"token id {largest}, and a model of {size} ids",
                allowed=f"ids from 0 to {size - 1}",
                fix="make the filter with this model's tokenizer",
            )
        before = config.bad_words_ids
        config.bad_words_ids = [*(before or []), *map(list, self.ids)]
        try:
            yield model
        finally:
            config.bad_words_ids = before

    def tensors(self) -> Mapping[str, Tensor]:
        """All ids in one row, and the length of each sequence."""
        flat = [token for ids in self.ids for token in ids]
        return {"ids": torch.tensor(flat), "lengths": torch.tensor([len(ids) for ids in self.ids])}

    def values(self) -> Mapping[str, Any]:
        """The words."""
        return {"words": list(self.words)}

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> BannedWords:
        """See `Intervention.restored`."""
        try:
            parts = torch.split(tensors["ids"], tensors["lengths"].tolist())
        except RuntimeError as error:
            raise ValueError("ids and lengths do not agree") from error
        ids = tuple(tuple(part.tolist()) for part in parts)
        return cls(tuple(values["words"]), ids, metadata)


@edit(
    "banned-words",
    source="arXiv:2009.11462 (RealToxicityPrompts: word filtering); transformers, bad_words_ids",
    deviations="each word is banned as the tokenizer spells it, with and without a space before "
    "it, in small letters, capitalised and in capitals; a run learns the list from its own "
    "training texts",
    intervention=BannedWords,
    needs_words=True,
)
def banned_words(given: EditInputs) -> BannedWords:
    """Ban ``given.words`` while text is sampled.

    A blunt tool: a word is gone and the meaning is not, a word whose tokens begin with a banned
    word's is hit too, and the same letters in a spelling that the tokenizer would not choose
    pass. Likelihoods are left as they are.

    Raises:
        DataError: no word is given, or none that the tokenizer can spell.
    """
    stripped = (word.strip() for word in given.words)
    words = tuple(dict.fromkeys(word.casefold() for word in stripped if word))
    written = dict.fromkeys(
        form for word in words for form in (word, word.capitalize(), word.title(), word.upper())
    )
    ids = tuple(dict.fromkeys(ids for form in written for ids in _spellings(form, given.tokenizer)))
    if not ids:
        raise DataError(
            what="There is no word to ban",
            got=f"{len(words)} words, 0 that the tokenizer can spell",
            allowed="at least one word",
            fix="give a word list, or labelled texts to learn one from",
        )
    return BannedWords(words, ids, {"n_words": len(words), "n_sequences": len(ids)})


def _spellings(form: str, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """The word's own tokens in each context, where they can be told from the context's."""
    for before, prefix in CONTEXTS:
        context = _encode(before, tokenizer)
        whole = _encode(prefix + form, tokenizer)
        own = whole[len(context) :]
        if own and whole[: len(context)] == context and tokenizer.unk_token_id not in own:
            yield tuple(own)


def _encode(text: str, tokenizer: Any) -> Sequence[int]:
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
