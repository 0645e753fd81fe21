"""Pairs, labelled texts and prompts: which rows make them, which are skipped and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.data.sources import read_labelled, read_pairs, read_prompts
from expunge.data.text import Labelled, Pair, Text
from expunge.errors import DataError, RecipeError

WORDS = st.lists(st.sampled_from(["you", "You", "are", "ARE", "a", "moron", "straße", "STRASSE"]))
READERS = (read_pairs, read_labelled, read_prompts)
PIECES = ['{"toxic": "a", "neutral": "b"}', '{"text": "a", "label": ', "1}", "\n", "nan", '"x"']
FRAGMENTS = st.lists(st.sampled_from([*PIECES, '{"prompt": {"text": "a"}}']), max_size=9)


def write(folder: Path, name: str, content: str | list[Any]) -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_text(content, encoding="utf-8")
    return path


def reasons(loaded: Any) -> list[tuple[int, str]]:
    return [(one.row, one.reason) for one in loaded.skipped]


# A pair and its opening


@pytest.mark.parametrize(
    ("toxic", "neutral", "opening"),
    [
        ("you are a moron", "you are wrong", "you are"),
        ("YOU are a moron", "You are wrong", "You are"),  # as the neutral wording writes it
        ("you  are a moron", "you\tare wrong", "you\tare"),
        ("moron , go away", "please go away", ""),
        ("you're a moron", "you are wrong", ""),  # words are whole
        ("what the heck is it, idiot", "what the heck is it,", "what the heck is it,"),
        ("no", "no way", "no"),
        ("STRASSE frei, idiot", "straße frei bitte", "straße"),
        ("", "you", ""),
    ],
)
def test_opening(toxic: str, neutral: str, opening: str) -> None:
    pair = Pair(toxic, neutral)
    assert pair.opening == opening
    assert pair.after_opening == Text(neutral, prompt_chars=len(opening))


@given(WORDS, WORDS, WORDS)
def test_opening_agrees_with_the_plain_definition(shared, toxic, neutral) -> None:
    one, other = [*shared, *toxic], [*shared, *neutral]
    pair = Pair(" ".join(one), " ".join(other))
    same = [a.casefold() == b.casefold() for a, b in zip(one, other, strict=False)]
    count = [*same, False].index(False)
    assert pair.opening == " ".join(other[:count])
    assert count >= len(shared)
    assert pair.neutral.startswith(pair.opening)


def test_content_ignores_the_neutral_wording() -> None:
    assert Pair("a", "b").content == Pair("a", "c").content == "a"
    assert Labelled("a", toxic=True).content == Labelled("a", toxic=False).content == "a"


# Pairs


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("toxic\tneutral1", "a moron\ta man", Pair("a moron", "a man")),
        ("toxic\tneutral", "a moron \t a man", Pair("a moron", "a man")),
        ("toxic\tneutral1\tneutral2\tneutral3", "a\t\tb\tc", Pair("a", "b")),
        ("en_toxic_comment\ten_neutral_comment", "a\tb", Pair("a", "b")),
    ],
)
def test_pair_columns(tmp_path: Path, header: str, row: str, expected: Pair) -> None:
    assert read_pairs(write(tmp_path, "x.tsv", f"{header}\n{row}\n")).items == (expected,)


def test_pairs_that_are_none_are_counted_with_their_reason(tmp_path: Path) -> None:
    rows = "a1\tb1\na2\tb2\na3\tb3\n\tb\na\t \nA  moron\ta moron\na1\tb1\na1\tb4\n"
    loaded = read_pairs(write(tmp_path, "x.tsv", "toxic\tneutral1\n" + rows))
    assert loaded.items[-1] == Pair("a1", "b4")  # another wording of the same is no duplicate
    assert len(loaded.items) == 4
    assert reasons(loaded) == [
        (5, "unpaired: no toxic wording"),
        (6, "unpaired: no neutral wording"),
        (7, "both wordings are the same"),
        (8, "duplicate of row 2"),
    ]
    assert "4 of 8 rows skipped: row 5 (unpaired: no toxic wording)" in str(loaded)


def test_pairs_in_json(tmp_path: Path) -> None:
    rows = [{"toxic": "a", "neutral": "b"}, {"toxic": "c", "neutral": None}]
    rows += [{"toxic": 1, "neutral": "b"}, {"toxic": "e", "neutral": "f"}]
    loaded = read_pairs(write(tmp_path, "x.jsonl", rows))
    assert loaded.items == (Pair("a", "b"), Pair("e", "f"))
    assert reasons(loaded) == [
        (2, "unpaired: no neutral wording"),
        (3, "toxic is a number, not text"),
    ]


# Labelled texts

TOXIC, NEUTRAL = Labelled("a", toxic=True), Labelled("a", toxic=False)


@pytest.mark.parametrize("label", [1, 1.0, True, "1", "true", "Toxic", " yes "])
@pytest.mark.parametrize("column", ["text", "comment_text"])
def test_toxic_labels(tmp_path: Path, column: str, label: Any) -> None:
    path = write(tmp_path, "x.jsonl", [{column: "a", "label": label}])
    assert read_labelled(path).items == (TOXIC,)


@pytest.mark.parametrize("label", [0, 0.0, False, "0", "false", "neutral", "Non-toxic", "no"])
def test_neutral_labels(tmp_path: Path, label: Any) -> None:
    path = write(tmp_path, "x.jsonl", [{"text": "a", "label": label}])
    assert read_labelled(path).items == (NEUTRAL,)


@pytest.mark.parametrize(
    ("row", "toxic"),
    [
        ("0,0,0,0,0,0", False),
        ("1,0,0,0,0,0", True),
        ("0,0,0,1,0,0", True),  # any of the six
        ("1,1,1,1,1,1", True),
    ],
)
def test_jigsaw_labels(tmp_path: Path, row: str, toxic: bool) -> None:
    header = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"
    path = write(tmp_path, "x.csv", f"{header}\n7,a,{row}\n8,b,-1,-1,-1,-1,-1,-1\n")
    loaded = read_labelled(path)
    assert loaded.items == (Labelled("a", toxic),)
    assert reasons(loaded) == [(3, "not labelled (-1)")]


@pytest.mark.parametrize("name", ["toxicity", "target"])
def test_ratings_and_their_threshold(tmp_path: Path, name: str) -> None:
    rows = [(0.49, "a"), (0.5, "b"), (1, "c"), (0, "d"), ("0.7", "e")]
    path = write(tmp_path, "x.jsonl", [{"text": text, name: rating} for rating, text in rows])
    assert [one.text for one in read_labelled(path).items if one.toxic] == ["b", "c", "e"]
    strict = read_labelled(path, threshold=0.7).items
    assert [one.text for one in strict if one.toxic] == ["c", "e"]


def test_a_label_goes_before_a_rating(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", [{"text": "a", "label": 0, "toxicity": 0.9}])
    assert read_labelled(path).items == (NEUTRAL,)


def test_prompts_with_continuations_are_two_texts(tmp_path: Path) -> None:
    def part(text: str, rating: float | None) -> dict[str, Any]:
        return {"text": text, "toxicity": rating}

    rows = [
        {"prompt": part("a", 0.1), "continuation": part(" b", 0.9)},
        {"prompt": part("c", None), "continuation": part("d", 0.2)},
        {"prompt": part("a", 0.1), "continuation": part("e", 0.8)},
        {"prompt": part("f", 0.6)},
    ]
    loaded = read_labelled(write(tmp_path, "x.jsonl", rows))
    assert [(one.text, one.toxic) for one in loaded.items] == [
        ("a", False),
        ("b", True),
        ("d", False),
        ("e", True),
        ("f", True),
    ]
    assert reasons(loaded) == [(2, "prompt: no toxicity"), (3, "duplicate of row 1")]


def test_pairs_are_labelled_texts_too(tmp_path: Path) -> None:
    path = write(tmp_path, "x.tsv", "toxic\tneutral1\na\tb\nc\t\n")
    loaded = read_labelled(path)
    assert loaded.items == (TOXIC, Labelled("b", toxic=False))
    assert reasons(loaded) == [(3, "unpaired: no neutral wording")]


def test_field_names_the_text_and_its_label_lies_beside_it(tmp_path: Path) -> None:
    part = {"text": "a", "toxicity": 0.9}
    rows = [{"tweet": "a", "label": 0, "prompt": {"text": "b"}, "continuation": part}]
    path = write(tmp_path, "x.jsonl", rows)
    assert read_labelled(path, field="tweet").items == (NEUTRAL,)
    assert read_labelled(path, field="continuation.text").items == (TOXIC,)
    flat = write(tmp_path, "y.csv", "body.text,label\na,1\n")
    assert read_labelled(flat, field="body.text").items == (TOXIC,)
    with pytest.raises(DataError, match="no column 'twet'"):
        read_labelled(path, field="twet")


def test_one_text_under_two_labels_stays_two_items(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", [{"text": "a", "label": 0}, {"text": "a", "label": 1}])
    assert read_labelled(path).items == (NEUTRAL, TOXIC)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "no label column"),
        ({"label": 1}, "no text column"),
        ({"text": "", "label": 1}, "no text"),
        ({"text": "a", "label": None}, "no label"),
        ({"text": "a", "label": -1}, "not labelled (-1)"),
        ({"text": "a", "label": 2}, "label '2' is not toxic, neutral, true, false, 1 or 0"),
        ({"text": "a", "label": "hate"}, "label 'hate' is not toxic, neutral, true, false, 1 or 0"),
        ({"text": "a", "toxicity": 1.2}, "toxicity '1.2' is not a number from 0 to 1"),
        ({"text": "a", "toxicity": "high"}, "toxicity 'high' is not a number from 0 to 1"),
        ({"text": "a", "target": [1]}, "target '[1]' is not a number from 0 to 1"),
        ({"text": "a", "target": float("nan")}, "no target"),
    ],
)
def test_bad_labelled_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = [{"text": "b", "label": 1}, {"text": "c", "label": 0}]
    loaded = read_labelled(write(tmp_path, "x.jsonl", [*good, row]))
    assert (len(loaded.items), reasons(loaded)) == (2, [(3, reason)])


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_threshold_out_of_range(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(RecipeError, match="threshold is out of range"):
        read_labelled(write(tmp_path, "x.jsonl", [{"text": "a", "label": 1}]), threshold=threshold)


# Prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", [{"prompt": {"text": "you are", "toxicity": 0.1}, "rude": {"text": "x"}}]),
        ("x.jsonl", [{"prompt": "you are", "completion": "x"}]),
        ("x.jsonl", [{"opening": " you are "}]),
        ("x.csv", "text,id\nyou are,1\n"),
        ("x.txt", "you are\nyou are\n"),
    ],
)
def test_prompts(tmp_path: Path, name: str, content: str | list[Any]) -> None:
    assert read_prompts(write(tmp_path, name, content)).items == (Text("you are"),)


def test_a_prompt_a_line(tmp_path: Path) -> None:
    loaded = read_prompts(write(tmp_path, "x.txt", "you are\nthis is\nyou are\n"))
    assert loaded.items == (Text("you are"), Text("this is"))
    assert reasons(loaded) == [(3, "duplicate of row 1")]


# Sources that cannot be used


@pytest.mark.parametrize(
    ("read", "name", "content", "parts"),
    [
        (read_pairs, "x.txt", "a\nb", ("no usable row", "no toxic column", "toxic + neutral1")),
        (read_pairs, "x.tsv", "toxic\na\n", ("no neutral column", "columns found: toxic")),
        (read_pairs, "x.tsv", "toxic\tneutral\na\t\n\tb\n", ("2 of 2 rows", "unpaired")),
        (read_pairs, "x.tsv", "", ("is empty",)),
        (read_labelled, "x.txt", "a\nb", ("no label column", "Jigsaw", "columns found: text")),
        (read_labelled, "x.csv", "id,toxic\n1,0\n", ("no text column", "id, toxic")),
        (read_prompts, "x.csv", "body\na\n", ("no prompt column", "prompt.text", "body")),
        (read_labelled, "x.pkl", "x", ("pickle can run code",)),
    ],
)
def test_refused(
    tmp_path: Path, read: Any, name: str, content: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, name, content))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert all((caught.value.got, caught.value.allowed, caught.value.fix))


def test_a_saved_table_is_read_like_its_rows(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    loaded = read_labelled(tmp_path / "x.parquet")
    assert (loaded.items, reasons(loaded)) == ((TOXIC,), [(2, "no label")])


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".jsonl", ".csv", ".tsv", ".json"]), FRAGMENTS.map("".join))
def test_any_text_is_read_or_refused(tmp_path: Path, suffix: str, content: str) -> None:
    path = write(tmp_path, f"x{suffix}", content)
    for read in READERS:
        try:
            loaded = read(path)
        except DataError as error:
            assert all((error.what, error.got, error.allowed, error.fix))
        else:
            assert loaded.items and str(loaded)
