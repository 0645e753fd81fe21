"""Token ids, prompt lengths at hard boundaries, the order of batches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from expunge.data.text import Text
from expunge.data.tokens import (
    Encoded,
    check_vocabulary,
    encode,
    too_short,
    training_batches,
)
from expunge.errors import DataError, ModelError, RecipeError


def tokenizer(special: str = "<s> $A", **names: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows "ab" and " a" as one token each, with <s> and </s>."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "Ġ": 5, "ab": 6, "Ġa": 7, "<pad>": 8}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=special, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


class Slow:
    """The same tokenizer without character spans."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        assert not settings["return_offsets_mapping"]
        return self.fast(texts, **settings)


@pytest.mark.parametrize("special", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize(
    ("text", "prompt_chars", "prompt_tokens"),
    [
        ("c a", 1, 1),  # c | Ġa: the space goes with the answer
        ("cca", 2, 2),
        ("cab", 2, 1),  # c | ab: a token across the boundary belongs to the answer
        ("abc", 0, 0),
        ("abc", 2, 1),
    ],
)
def test_prompt_tokens(special: str, text: str, prompt_chars: int, prompt_tokens: int) -> None:
    opening = special.startswith("<s>")
    for tok in (tokenizer(special), Slow(tokenizer(special))):
        (one,) = encode([Text(text, prompt_chars)], tok, max_tokens=16)
        assert one.prompt_tokens == prompt_tokens + opening
        assert not one.truncated


def test_ids_and_truncation() -> None:
    (one,) = encode([Text("cccc", 2)], tokenizer(), max_tokens=16)
    assert one == Encoded((0, 4, 4, 4, 4), 3, False)
    (one,) = encode([Text("cccc", 2)], tokenizer(), max_tokens=4)
    assert one == Encoded((0, 4, 4, 4), 3, True)
    (one,) = encode([Text("cccc", 2)], tokenizer(), max_tokens=2)
    assert one == Encoded((0, 4), 2, True)


def test_settings_inside_the_tokenizer_do_not_cut_or_pad() -> None:
    tok = tokenizer(pad_token="<pad>")
    tok.backend_tokenizer.enable_truncation(2)
    tok.backend_tokenizer.enable_padding(length=9)
    assert encode([Text("ccc")], tok, max_tokens=16)[0] == Encoded((0, 4, 4, 4), 1, False)


def test_too_short() -> None:
    texts = [Text("c"), Text(""), Text("cc", 2), Text("ccccc", 4)]
    encoded = encode(texts, tokenizer(), max_tokens=4)
    assert len(encoded) == 4
    assert too_short(encoded) == {
        1: "fewer than 2 tokens",
        2: "no token after the prompt",
        3: "no token after the prompt (cut off at max_tokens)",
    }
    assert encode([], tokenizer(), max_tokens=4) == []


@pytest.mark.parametrize("max_tokens", [1, 0, -5])
def test_max_tokens_out_of_range(max_tokens: int) -> None:
    with pytest.raises(RecipeError, match="max_tokens is out of range") as caught:
        encode([Text("a")], tokenizer(), max_tokens=max_tokens)
    assert caught.value.got == str(max_tokens)


def test_check_vocabulary() -> None:
    check_vocabulary(tokenizer(), 9)
    check_vocabulary(tokenizer(), 64)
    with pytest.raises(ModelError, match="does not belong to this model") as caught:
        check_vocabulary(tokenizer(), 8)
    assert "'<pad>' with id 8" in caught.value.got and "8 ids" in caught.value.got
    assert caught.value.allowed == "ids from 0 to 7"


# The order of training


@given(st.lists(st.integers(1, 99), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_batches_are_whole_distinct_and_repeatable(lengths, batch_size, seed) -> None:
    settings = {"batch_size": batch_size, "seed": seed, "lengths": lengths}
    batches = training_batches(len(lengths), **settings)
    used = [index for batch in batches for index in batch]
    assert len(set(used)) == len(used) and set(used) <= set(range(len(lengths)))
    if len(lengths) < batch_size:
        assert len(batches) == 1 and len(used) == len(lengths)
    else:
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(lengths) - len(used) < batch_size
    assert batches == training_batches(len(lengths), **settings)


def test_batches_hold_texts_of_like_length() -> None:
    lengths = [1 + 37 * i % 400 for i in range(1600)]
    batches = training_batches(1600, batch_size=8, seed=0, lengths=lengths)
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches != training_batches(1600, batch_size=8, seed=1, lengths=lengths)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)


def test_left_out_texts_are_random_not_the_longest() -> None:
    left = set()
    for seed in range(30):
        batches = training_batches(9, batch_size=4, seed=seed, lengths=list(range(9)))
        left |= set(range(9)) - {index for batch in batches for index in batch}
    assert len(left) > 5


def test_batches_are_the_same_in_every_release() -> None:
    batches = training_batches(5, batch_size=2, seed=0, lengths=[5, 4, 3, 2, 1])
    assert batches == [(4, 3), (1, 0)]


def test_bad_batches() -> None:
    with pytest.raises(RecipeError, match="batch_size is out of range"):
        training_batches(1, batch_size=0, seed=0, lengths=[1])
    with pytest.raises(DataError, match="nothing to train on"):
        training_batches(0, batch_size=1, seed=0, lengths=[])
    with pytest.raises(ValueError, match="1 lengths for 2 texts"):
        training_batches(2, batch_size=1, seed=0, lengths=[1])
