"""Real public data: slices beside the checkout; without them these tests are skipped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from expunge.data.sources import (
    read_labelled,
    read_pairs,
    read_prompts,
    read_questions,
    read_texts,
)
from expunge.data.splits import find_overlap, separate, split_by_content
from expunge.data.tokens import check_vocabulary, encode, too_short
from expunge.errors import DataError, ModelError

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="real data sets are not beside the checkout"),
]


@pytest.mark.parametrize(
    ("name", "field", "items", "skipped"),
    [
        ("tofu/forget05.jsonl", None, 200, 0),
        ("tofu/retain90.jsonl", None, 3600, 0),
        ("wikitext/wikitext2_train_part.txt", None, 3000, 0),
        ("wikitext/wikitext2_valid.txt", None, 1021, 139),
        ("tinystories/tinystories_sample.txt", None, 5, 0),
        ("paradetox/paradetox_dev.tsv", "neutral1", 2496, 4),
        ("paradetox/paradetox_dev.tsv", "toxic", 2496, 4),
        ("jigsaw-sample/train.csv", "comment_text", 282, 0),
        ("jigsaw-sample/test.csv", "comment_text", 51, 0),
        ("real-toxicity-prompts/toxic_dev.jsonl", "prompt.text", 200, 0),
        ("real-toxicity-prompts/nontoxic_dev.jsonl", "continuation.text", 200, 0),
    ],
)
def test_texts(name: str, field: str | None, items: int, skipped: int) -> None:
    loaded = read_texts(DATA / name, field=field)
    assert (len(loaded.items), len(loaded.skipped)) == (items, skipped)
    assert all(item.text.strip() for item in loaded.items)


@pytest.mark.parametrize(
    ("name", "items", "rows"),
    [
        ("astronomy", 152, []),
        ("computer_security", 95, [12, 24, 31, 72, 78]),
        ("high_school_geography", 198, []),
        ("nutrition", 199, [105]),
        ("world_religions", 171, []),
    ],
)
def test_mmlu(name: str, items: int, rows: list[int]) -> None:
    loaded = read_questions(DATA / f"mmlu/{name}_test.csv")
    assert len(loaded.items) == items
    assert [one.row for one in loaded.skipped] == rows
    assert all(one.chance == 0.25 for one in loaded.items)
    assert {one.answer for one in loaded.items} == {0, 1, 2, 3}


@pytest.mark.parametrize(("name", "items"), [("forget05", 200), ("retain", 400)])
def test_tofu_questions(name: str, items: int) -> None:
    loaded = read_questions(DATA / f"tofu/{name}_perturbed.jsonl")
    assert (len(loaded.items), loaded.skipped) == (items, ())
    assert {(len(one.choices), one.answer) for one in loaded.items} == {(6, 0)}


def test_tofu_texts_know_where_the_answer_starts() -> None:
    first = read_texts(DATA / "tofu/forget05.jsonl", limit=1).items[0]
    assert first.text[first.prompt_chars :] == " The author's name is Hina Ameen."
    assert first.text[: first.prompt_chars].endswith("?\nAnswer:")


def test_paradetox_rows_with_lost_columns_are_named() -> None:
    loaded = read_texts(DATA / "paradetox/paradetox_dev.tsv", field="neutral1")
    assert [one.row for one in loaded.skipped] == [1118, 1420, 1865, 2192]
    assert "4 of 2500 rows skipped: row 1118 (3 columns where the header has 4)" in str(loaded)


def test_paradetox_pairs() -> None:
    loaded = read_pairs(DATA / "paradetox/paradetox_dev.tsv")
    reasons = Counter(one.reason for one in loaded.skipped)
    assert len(loaded.items) == 2476
    assert reasons == {
        "both wordings are the same": 20,
        "2 columns where the header has 4": 3,
        "3 columns where the header has 4": 1,
    }
    assert sum(bool(pair.opening) for pair in loaded.items) == 1668
    assert all(pair.neutral.startswith(pair.opening) for pair in loaded.items)


@pytest.mark.parametrize(
    ("name", "toxic", "neutral", "skipped"),
    [
        ("jigsaw-sample/train.csv", 29, 253, 0),
        ("jigsaw-sample/test.csv", 2, 24, 25),  # nobody labelled the others
        ("real-toxicity-prompts/toxic_dev.jsonl", 281, 119, 0),
        ("real-toxicity-prompts/nontoxic_dev.jsonl", 74, 326, 0),
        ("paradetox/paradetox_dev.tsv", 2476, 2476, 24),
    ],
)
def test_labelled(name: str, toxic: int, neutral: int, skipped: int) -> None:
    loaded = read_labelled(DATA / name)
    assert Counter(one.toxic for one in loaded.items) == {True: toxic, False: neutral}
    assert len(loaded.skipped) == skipped


def test_labels_without_texts_are_refused() -> None:
    with pytest.raises(DataError, match="no text column"):
        read_labelled(DATA / "jigsaw-sample/test_labels.csv")


def test_prompts() -> None:
    loaded = read_prompts(DATA / "real-toxicity-prompts/toxic_dev.jsonl")
    assert (len(loaded.items), loaded.skipped) == (200, ())
    column = read_texts(DATA / "real-toxicity-prompts/toxic_dev.jsonl", field="prompt.text")
    assert loaded.items == column.items


def test_wrong_reader_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"prompt\.text"):
        read_texts(DATA / "real-toxicity-prompts/toxic_dev.jsonl")
    with pytest.raises(DataError, match="several data sets"):
        read_texts(DATA / "tofu")


def test_forget_and_retain_are_apart_and_a_leak_is_found() -> None:
    forget = read_texts(DATA / "tofu/forget05.jsonl").items
    retain = read_texts(DATA / "tofu/retain90.jsonl").items
    assert find_overlap(forget, retain) == []
    kept, dropped = separate(forget, [*retain, *forget[:3]], on_overlap="drop")
    assert (kept, dropped) == (retain, 3)
    whole = split_by_content(forget, train=0.8, validation=0.1, test=0.1, seed=0)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (160, 20, 20)


@pytest.mark.parametrize("name", ["lab7m", "stories260K"])
def test_real_tokenizers(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    texts = read_texts(DATA / "tofu/forget05.jsonl", limit=50).items
    encoded = encode(texts, tokenizer, max_tokens=512)
    assert too_short(encoded) == {}
    for text, one in zip(texts, encoded, strict=True):
        assert one.ids[0] == tokenizer.bos_token_id
        answer = tokenizer.decode(one.ids[one.prompt_tokens :])
        assert answer.strip() == text.text[text.prompt_chars :].strip()
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ModelError, match=f"a model of {len(tokenizer) - 1} ids"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)
