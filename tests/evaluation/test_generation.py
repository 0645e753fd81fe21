"""Sampled continuations: against a naive full forward, in any batch, with any padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from expunge.errors import DataError, ResourceError
from expunge.evaluation import generation
from expunge.evaluation.generation import Continuation, Sampling, continuations

END = 1
WORDS = "<s> </s> <unk> a b c d e f g h i j k l m n o p q r".split()
SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": None,
}
PROMPTS = ["a b c", "d", "e f g h i j k l m n", "b a", "c c c c c c"]
SAMPLING = Sampling(samples=3, new_tokens=7, seed=5)


def build(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": END}
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=32, **special
        )
        model: Any = GPT2LMHeadModel(config)
    elif kind == "mamba":
        model = MambaForCausalLM(
            MambaConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, **special)
        )
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default of .02 leaves every token nearly as likely
                parameter.mul_(6 if kind != "mamba" else 1)
    return model.eval()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a word, ``<s>`` in front, no padding token."""
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@torch.inference_mode()
def naive(model: Any, prompt: Sequence[int], row: tuple[int, int], sampling: Sampling) -> list[int]:
    """One continuation by full forwards of one sequence, with the noise of (seed, row)."""
    stream = np.random.default_rng([sampling.seed, *row])
    ids = list(prompt)
    for _ in range(sampling.new_tokens):
        logits_V = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        noise_V = -np.log(stream.standard_exponential(len(logits_V)))
        ids.append(int(np.argmax(logits_V / sampling.temperature + noise_V)))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def ids_of(made: Sequence[Sequence[Continuation]]) -> list[list[tuple[int, ...]]]:
    return [[one.ids for one in own] for own in made]


def flat(made: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(made))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "mamba"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cached_batches_equal_the_naive_loop(
    kind: str, temperature: float, words: PreTrainedTokenizerFast
) -> None:
    model = build(kind)
    sampling = Sampling(3, 7, temperature, seed=5)
    made = continuations(model, words, PROMPTS, sampling)
    expected = [
        [tuple(naive(model, words(text)["input_ids"], (at, s), sampling)) for s in range(3)]
        for at, text in enumerate(PROMPTS)
    ]
    assert ids_of(made) == expected
    assert len({ids for own in expected for ids in own}) > 5  # a control: samples do differ
    assert all(
        one.prompt_ids == tuple(words(text)["input_ids"])
        for text, own in zip(PROMPTS, made, strict=True)
        for one in own
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_batch_size_changes_nothing(kind: str, words: PreTrainedTokenizerFast) -> None:
    model = build(kind)
    every = [
        continuations(model, words, PROMPTS, Sampling(3, 7, seed=5, batch_size=size))
        for size in (1, 4, 64)
    ]
    assert every[0] == every[1] == every[2]


def test_left_padding_changes_nothing(words: PreTrainedTokenizerFast) -> None:
    """The first prompt beside a much longer one, and alone."""
    model = build()
    together = continuations(model, words, ["a b", "c " * 20], SAMPLING)
    assert together[0] == continuations(model, words, ["a b"], SAMPLING)[0]


def test_a_sample_does_not_depend_on_how_many_there_are(words: PreTrainedTokenizerFast) -> None:
    model = build()
    few = continuations(model, words, PROMPTS, Sampling(2, 7, seed=5))
    many = continuations(model, words, PROMPTS, Sampling(4, 7, seed=5))
    assert [own[:2] for own in many] == list(few)
    longer = continuations(model, words, PROMPTS, Sampling(2, 9, seed=5))
    for short, long in zip(flat(ids_of(few)), flat(ids_of(longer)), strict=True):
        assert long[: len(short)] == short
    other = continuations(model, words, PROMPTS, Sampling(2, 7, seed=6))
    assert ids_of(other) != ids_of(few)


def test_frequencies_are_the_softmax(words: PreTrainedTokenizerFast) -> None:
    model, n = build(), 3000
    (own,) = continuations(model, words, ["a b"], Sampling(n, 1, temperature=2.0, batch_size=500))
    counts = np.bincount([one.ids[0] for one in own], minlength=len(WORDS))
    with torch.inference_mode():
        logits_V = model(torch.tensor([words("a b")["input_ids"]])).logits[0, -1]
    expected = n * (logits_V / 2).double().softmax(0).numpy()
    assert expected.min() > 5  # as the test asks for
    assert chisquare(counts, expected).pvalue > 1e-3


def test_rare_tokens_do_not_win_by_rounding() -> None:
    """Among 2^24 tokens of noise, none is beyond what its number makes likely."""
    noise = generation._Noise([(0, 0)], SAMPLING)
    gumbel_V = noise(torch.zeros(1, 1), torch.zeros(1, 1 << 24))[0]
    assert bool(gumbel_V.isfinite().all())
    assert float(gumbel_V.max()) < np.log(1 << 24) + 12  # P(above) = 6e-6
    assert float(gumbel_V.mean()) == pytest.approx(np.euler_gamma, abs=2e-3)


def test_greedy(words: PreTrainedTokenizerFast) -> None:
    model, counts = build(), []
    made = continuations(model, words, PROMPTS, Sampling(2, 5, 0.0), on_progress=counts.append)
    assert all(own[0] == own[1] for own in made) and sum(counts) == 10
    ids = words(PROMPTS[0])["input_ids"]
    with torch.inference_mode():
        for token in made[0][0].ids:
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_a_continuation_ends_with_the_end_token(words: PreTrainedTokenizerFast) -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[END] = 0  # a logit of 0: likely enough, not certain
    made = flat(continuations(model, words, PROMPTS, Sampling(20, 7)))
    ended = [one for one in made if END in one.ids]
    assert ended and len(ended) < len(made)
    assert all(one.ids.index(END) == len(one.ids) - 1 for one in ended)
    assert all(len(one.ids) == 7 for one in made if END not in one.ids)
    assert all("</s>" not in one.text for one in made)
    assert all(one.empty for one in made if one.ids == (END,))
    # The model's own list of end tokens goes before the tokenizer's.
    model.generation_config.eos_token_id = [5, 6]
    made = flat(continuations(model, words, PROMPTS, Sampling(20, 7)))
    assert any(END in one.ids[:-1] for one in made)
    assert all(not {5, 6} & set(one.ids[:-1]) for one in made)


def test_only_the_decoding_filter_of_the_models_settings_counts(
    words: PreTrainedTokenizerFast,
) -> None:
    model = build().train()
    plain = continuations(model, words, PROMPTS, SAMPLING)
    own = model.generation_config
    own.update(do_sample=True, top_k=1, temperature=0.01, max_length=3, repetition_penalty=9.0)
    assert continuations(model, words, PROMPTS, SAMPLING) == plain
    assert model.generation_config is own and own.top_k == 1
    assert model.training
    met = plain[0][0].ids[0]
    own.bad_words_ids = [[met]]
    filtered = continuations(model, words, PROMPTS, SAMPLING)
    assert all(met not in one.ids for one in flat(filtered))


def test_text_keeps_its_first_space_and_split_characters() -> None:
    """Byte-level tokens: an é in two tokens, whose first half is no character alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {mark: at for at, mark in enumerate(["<s>", "</s>", *alphabet])}
    built = Tokenizer(models.BPE(vocab, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    prompt, new = tokenizer("a")["input_ids"], tokenizer(" é!")["input_ids"]
    assert generation._text(tokenizer, prompt, [*new, 1]) == " é!"
    assert generation._text(tokenizer, prompt, []) == ""


def test_prompts_too_long_or_empty(words: PreTrainedTokenizerFast) -> None:
    model = build()
    with pytest.raises(DataError) as caught:
        continuations(model, words, ["a", "b " * 30], SAMPLING)
    for part in ("1 of 2 prompts", "31 tokens", "7 new", "up to 25 tokens", "context of 32"):
        assert part in str(caught.value)
    fits = continuations(model, words, ["b " * 24], SAMPLING)
    assert len(fits[0]) == 3
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    with pytest.raises(DataError, match="1 of 2 prompts without a token"):
        continuations(model, bare, ["a", ""], SAMPLING)
    assert continuations(model, words, [], SAMPLING) == ()


def test_an_end_token_after_the_prompt_is_left_out(words: PreTrainedTokenizerFast) -> None:
    ending = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
    )
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", END)]
    )
    assert ending("a")["input_ids"][-1] == END
    model = build()
    assert continuations(model, ending, PROMPTS, SAMPLING) == continuations(
        model, words, PROMPTS, SAMPLING
    )


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, words: PreTrainedTokenizerFast
) -> None:
    model = build()
    expected = continuations(model, words, PROMPTS, SAMPLING)
    real, sizes, room = generation._generate, [], 4

    def tight(model: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError("no room")
        return real(model, prompts, *rest)

    monkeypatch.setattr(generation, "_generate", tight)
    counts: list[int] = []
    got = continuations(model, words, PROMPTS, SAMPLING, on_progress=counts.append)
    assert got == expected
    assert sizes[:3] == [15, 7, 3] and sum(counts) == 15
    room = 0
    with pytest.raises(ResourceError, match="sampling continuations"):
        continuations(model, words, PROMPTS, SAMPLING)
