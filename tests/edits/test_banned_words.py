"""Banned words: spellings, and the generation config before, during and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_edit_contract import inputs, word_tokenizer
from transformers import AutoModel, AutoTokenizer

from expunge import miniature
from expunge.edits.banned_words import BannedWords, banned_words
from expunge.edits.base import EditInputs
from expunge.errors import DataError, ModelError, PatchError
from tiny import VOCABULARY, tiny_model

MORON, CAPITAL = VOCABULARY - 2, VOCABULARY - 1


@pytest.fixture(scope="module")
def bpe() -> Any:
    """Byte-level: a space before a word belongs to its first token."""
    return AutoTokenizer.from_pretrained(miniature.base_directory())


def ban(tokenizer: Any, *words: str) -> BannedWords:
    return banned_words(EditInputs(None, None, tokenizer, words=words))  # type: ignore[arg-type]


def test_a_word_is_banned_with_and_without_a_space_and_in_capitals(bpe: Any) -> None:
    spelled = {bpe.decode(ids) for ids in ban(bpe, "moron").ids}
    assert spelled == {" moron", "moron", " Moron", "Moron", " MORON", "MORON"}


def test_a_phrase_keeps_its_spaces(bpe: Any) -> None:
    spelled = {bpe.decode(ids) for ids in ban(bpe, "Silly fool").ids}
    assert {" silly fool", "Silly fool", " Silly Fool", "SILLY FOOL"} <= spelled


def test_words_are_trimmed_and_counted_once(bpe: Any) -> None:
    filtered = ban(bpe, " moron ", "Moron", "", "idiot")
    assert filtered.words == ("moron", "idiot")
    assert filtered.metadata == {"n_words": 2, "n_sequences": 12}
    assert len(set(filtered.ids)) == len(filtered.ids)


def test_a_word_that_the_tokenizer_cannot_spell_is_left_out() -> None:
    """Banning the unknown token would ban every rare word."""
    filtered = ban(word_tokenizer(), "moron", "unheard")
    assert set(filtered.ids) == {(MORON,), (CAPITAL,)}


@pytest.mark.parametrize("words", [(), ("", "  "), ("unheard",)])
def test_no_word_at_all_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no word to ban"):
        ban(word_tokenizer(), *words)


def test_bans_that_were_there_stay_and_are_restored() -> None:
    model, filtered = tiny_model("llama"), BannedWords(("moron",), ((MORON,), (5, 6)))
    model.generation_config.bad_words_ids = [[7]]
    with filtered.applied(model):
        assert model.generation_config.bad_words_ids == [[7], [MORON], [5, 6]]
    assert model.generation_config.bad_words_ids == [[7]]


def test_a_model_that_samples_nothing_but_the_word_samples_another() -> None:
    """The control samples it; under the filter it never comes."""
    given = inputs()
    with torch.no_grad():  # the bias of the head that Llama lacks
        given.model.lm_head.weight[MORON] = 0
        hidden_D = torch.ones(32)
        given.model.model.norm.weight.zero_()
        given.model.model.norm.register_forward_hook(lambda _m, _i, out: out + hidden_D)
        given.model.lm_head.weight[MORON] = 1.0

    def sampled() -> set[int]:
        ids = given.model.generate(torch.tensor([[1, 4]]), max_new_tokens=6, do_sample=False)
        return set(ids[0, 2:].tolist())

    assert sampled() == {MORON}
    with banned_words(given).applied(given.model):
        assert not sampled() & {MORON, CAPITAL}
    assert sampled() == {MORON}


def test_a_model_without_head_or_of_fewer_ids_is_refused(tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    body.generation_config = None
    with pytest.raises(ModelError, match="sampled"), ban(word_tokenizer(), "moron").applied(body):
        pass
    large = BannedWords(("moron",), ((VOCABULARY,),))
    with pytest.raises(PatchError, match="another model"), large.applied(tiny_model("llama")):
        pass
