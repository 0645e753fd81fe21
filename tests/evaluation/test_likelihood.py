"""Every log-probability against a naive one-at-a-time full forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

from expunge.data.text import Text
from expunge.errors import DataError, ResourceError
from expunge.evaluation import forward, likelihood
from expunge.evaluation.forward import shares_context
from expunge.evaluation.likelihood import answer_logprobs, score, text_nll
from expunge.evaluation.prepared import Prepared, Row, prepare, prepare_texts

WORDS = "<s> <unk> a b c d e f g h i j k l m n o p q r".split()
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROMPTS = ["a b c", "d", "e f g h i j k l m n", "b a", "c c c c c c"]
ANSWERS = [["d", "e f", "g h i j k"], ["a"], ["o", "p"], ["q r a b c d e", "f"], ["a", "b", "c"]]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=64)
        model: Any = GPT2LMHeadModel(config)
    elif kind == "mamba":
        # Recurrent: the fallback to whole sequences.
        model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default of .02 leaves every token nearly as likely
                parameter.mul_(8 if kind != "mamba" else 1)
    return model.eval()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def bytes_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS that merges "x" + " " + "y" across the boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: at for at, char in enumerate(alphabet)} | {"xĠ": 256, "xĠy": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("x", "Ġ"), ("xĠ", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.inference_mode()
def naive(model: Any, ids: list[int], start: int) -> float:
    """Log-probability of ``ids[start:]`` from one unpadded full forward."""
    logprobs_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(start, len(ids)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_match_naive(kind: str, batch_size: int, words: PreTrainedTokenizerFast) -> None:
    model = build(kind)
    assert shares_context(model) == (kind != "mamba")
    scored = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=batch_size)
    for prompt, answers, rows in zip(PROMPTS, ANSWERS, scored, strict=True):
        start = len(words(prompt)["input_ids"])
        for answer, (total, tokens) in zip(answers, rows, strict=True):
            ids = words(f"{prompt} {answer}")["input_ids"]
            assert tokens == len(answer.split()) == len(ids) - start
            assert total == pytest.approx(naive(model, ids, start), abs=1e-4)


def test_positive_control_the_answers_differ(words: PreTrainedTokenizerFast) -> None:
    scored = answer_logprobs(build("llama"), words, PROMPTS, ANSWERS, batch_size=8)
    totals = [total for rows in scored for total, _ in rows]
    assert len({round(total, 2) for total in totals}) == len(totals)


def test_without_logits_to_keep(words: PreTrainedTokenizerFast) -> None:
    class Plain(LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return super().forward(input_ids, attention_mask, position_ids, past_key_values)

    model = build("llama")
    plain = Plain(model.config)
    plain.load_state_dict(model.state_dict())
    one = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=8)
    two = answer_logprobs(plain, words, PROMPTS, ANSWERS, batch_size=8)
    flat = [total for rows in two for total, _ in rows]
    assert [t for rows in one for t, _ in rows] == pytest.approx(flat, abs=1e-4)


def test_boundary_merge_takes_the_common_beginning(bytes_bpe: PreTrainedTokenizerFast) -> None:
    ids = bytes_bpe("ax y")["input_ids"]
    assert bytes_bpe("ax")["input_ids"] != ids[:2]  # the tokenizer does merge
    prepared = prepare(bytes_bpe, ["ax", "ab"], [["y", "z"], ["y"]])
    ((merged, other), (plain,)) = prepared.groups
    assert (merged.start, len(merged.ids)) == (1, 2)  # a | xĠy
    assert (other.start, len(other.ids)) == (1, 3)  # a | xĠ z
    assert (plain.start, len(plain.ids)) == (2, 4)  # a b | Ġ y
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 260})).eval()
    scored = score(model, prepared, batch_size=8)
    for rows, group in zip(scored, prepared.groups, strict=True):
        for (total, tokens), row in zip(rows, group, strict=True):
            assert tokens == len(row.ids) - row.start
            assert total == pytest.approx(naive(model, list(row.ids), row.start), abs=1e-4)


def test_boundaries_may_differ_within_a_group() -> None:
    model = build("llama")
    group = (Row((0, 5, 6, 7, 8), 2), Row((0, 5, 6, 9), 3), Row((0, 5, 6), 3), Row((0, 5, 9), 2))
    ((*totals,),) = score(model, Prepared((group,)), batch_size=8)
    assert totals[2] == (0.0, 0)
    for at in (0, 1, 3):
        row = group[at]
        expected = naive(model, list(row.ids), row.start)
        assert totals[at] == (pytest.approx(expected, abs=1e-4), len(row.ids) - row.start)


def test_empty_prompt_answer_and_batch(words: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    assert answer_logprobs(model, words, [], [], batch_size=4) == []
    ((one, nothing),) = answer_logprobs(model, words, [""], [["a b", ""]], batch_size=4)
    assert one == (pytest.approx(naive(model, [0, 2, 3], 1), abs=1e-4), 2)
    assert nothing == (0.0, 0)
    with pytest.raises(ValueError, match="zip"):
        answer_logprobs(model, words, ["a"], [], batch_size=4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts(
    kind: str, words: PreTrainedTokenizerFast, bytes_bpe: PreTrainedTokenizerFast
) -> None:
    model = build(kind)
    texts = [
        Text("a b c d"),
        Text("a b c d", 3),
        Text("e"),
        Text(""),
        Text("a " * 30),
        Text("a", 1),
    ]
    got = text_nll(model, words, texts, max_tokens=9, batch_size=3)
    ids = [0, 2, 3, 4, 5]
    assert got[0] == (pytest.approx(-naive(model, ids, 1), abs=1e-4), 4)
    assert got[1] == (pytest.approx(-naive(model, ids, 3), abs=1e-4), 2)
    assert got[2] == (pytest.approx(-naive(model, [0, 6], 1), abs=1e-4), 1)
    assert got[3] == (0.0, 0)
    assert got[4] == (pytest.approx(-naive(model, [0] + [2] * 8, 1), abs=1e-4), 8)
    assert got[5] == (0.0, 0)
    # Without a BOS the first token has no context and is never scored.
    ((row,),) = prepare_texts(bytes_bpe, [Text("abc")], max_tokens=9).groups
    assert (row.start, len(row.ids)) == (1, 3)


def test_bfloat16_is_close(words: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    exact = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=8)
    model.to(torch.bfloat16)
    rough = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=8)
    for one, two in zip(exact, rough, strict=True):
        for (a, tokens), (b, _) in zip(one, two, strict=True):
            assert abs(a - b) / tokens < 0.15


def test_training_flags_and_weights_come_back(words: PreTrainedTokenizerFast) -> None:
    model = build("gpt2")  # has dropout
    quiet = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=8)
    model.train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=8) == quiet
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_progress_adds_up(kind: str, words: PreTrainedTokenizerFast) -> None:
    counts: list[int] = []
    prepared = prepare(words, PROMPTS, [*ANSWERS[:-1], ["", "a"]])
    score(build(kind), prepared, batch_size=3, on_progress=counts.append)
    assert sum(counts) == prepared.rows == 10


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_batch_holds_so_many_tokens(kind: str, words: PreTrainedTokenizerFast) -> None:
    """A long row is alone in its batch, and makes no other batch smaller."""
    rows = [Row(tuple(range(1, n + 1)), 1) for n in (3, 12, 2, 3, 2, 3, 12)]
    prepared = Prepared(tuple((row,) for row in rows))
    model, sizes = build(kind), []
    found = score(model, prepared, batch_size=100, batch_tokens=9, on_progress=sizes.append)
    assert sizes == [1, 1, 3, 2]
    for one, two in zip(found, score(model, prepared, batch_size=1), strict=True):
        assert [t for t, _ in one] == pytest.approx([t for t, _ in two], abs=1e-4)


def test_answers_that_share_a_prompt_are_not_parted() -> None:
    rows = tuple(Row((1, 2, 3, *range(4, n)), 3) for n in (9, 12))
    sizes: list[int] = []
    score(build("llama"), Prepared((rows,)), batch_size=1, batch_tokens=9, on_progress=sizes.append)
    assert sizes == [2]


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, words: PreTrainedTokenizerFast
) -> None:
    model = build("llama")
    expected = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=100)
    real, sizes, room = forward._logits, [], 3

    def tight(model: Any, ids_BT: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(ids_BT))
        if len(ids_BT) > room:
            raise torch.OutOfMemoryError("no room")
        return real(model, ids_BT, *args, **kwargs)

    monkeypatch.setattr(forward, "_logits", tight)
    got = answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=100)
    assert max(sizes) > room
    for one, two in zip(expected, got, strict=True):
        assert [t for t, _ in one] == pytest.approx([t for t, _ in two], abs=1e-4)
    room = 0
    with pytest.raises(ResourceError, match="single prompt"):
        answer_logprobs(model, words, PROMPTS, ANSWERS, batch_size=100)


def test_lengths_beyond_the_model(words: PreTrainedTokenizerFast) -> None:
    model, long = build("gpt2"), "a " * 80
    with pytest.raises(DataError, match="max_tokens"):
        answer_logprobs(model, words, [long.strip()], [["b", "c"]], batch_size=4)
    prepared = prepare(words, [long.strip(), "a"], [["b", "c"], ["b"]], max_tokens=64)
    scored = score(model, prepared, batch_size=4)
    assert scored[0] == [(0.0, 0), (0.0, 0)]
    assert scored[1][0][1] == 1


def test_shares_context_is_by_capability() -> None:
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    # A wrapper that hides the signature (PEFT) scores whole sequences.
    assert not shares_context(SimpleNamespace(forward=wrapped))  # type: ignore[arg-type]
    assert likelihood.shares_context is shares_context
