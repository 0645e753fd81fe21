"""Reading texts and questions: what is recognised, what is skipped and how it is said."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.data import sources
from expunge.data.sources import Loaded, Skipped, read_questions, read_texts
from expunge.data.text import Question, Text
from expunge.errors import DataError, RecipeError

datasets.disable_progress_bars()

MMLU = "question,A,B,C,D,answer\n"
TOFU = {
    "question": "Who?",
    "answer": "Ann.",
    "paraphrased_answer": "It is Ann.",
    "perturbed_answer": ["It is Bo.", "It is Cy."],
}


PIECES = [*'{}[],"\n\r\t0a', '{"text":', '"a"', "text", "1e999", MMLU]
PIECES += ['{"question": "q", "choices": ["a", "b"], "answer": 1}', '{"text": "b", "x": {"y": 1}}']
FRAGMENTS = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


def write(folder: Path, name: str, content: str | bytes | list[Any]) -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts_of(loaded: Loaded[Text]) -> list[str]:
    return [item.text for item in loaded.items]


# Texts, format by format


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo\n\n", ["one", "two"]),  # a blank line at the end separates nothing
        ("\n\none\ntwo", ["one", "two"]),
        ("one\nmore\n \t\ntwo\n", ["one\nmore", "two"]),
        ("one\n\n\n\ntwo\n\nthree", ["one", "two", "three"]),
        ("\ufeffone\r\nmore\r\n\r\ntwo\r\n", ["one\nmore", "two"]),
        ("one\rtwo", ["one", "two"]),
        ("a\u2028b\nc", ["a\u2028b", "c"]),
    ],
)
def test_txt(tmp_path: Path, content: str, expected: list[str]) -> None:
    assert texts_of(read_texts(write(tmp_path, "x.txt", content))) == expected


def test_txt_rows_are_lines(tmp_path: Path) -> None:
    loaded = read_texts(write(tmp_path, "x.txt", "one\n\nlong\nlong\n\none\n"))
    assert loaded.skipped == (Skipped(6, "duplicate of row 1"),)


@pytest.mark.parametrize(
    ("row", "text", "prompt_chars"),
    [
        ({"text": " a "}, "a", 0),
        ({"title": "T", "abstract": "A", "text": "B", "doi": "1"}, "T\nA\nB", 0),
        ({"title": "T", "abstract": None, "text": "B"}, "T\nB", 0),
        ({"question": "Who {x}?", "answer": "Ann"}, "Question: Who {x}?\nAnswer: Ann", 26),
        ({"prompt": "Say", "completion": "hello"}, "Say hello", 3),
        ({"prompt": "Say:\n", "response": "hello"}, "Say:\nhello", 5),
        ({"prompt": "Say", "completion": " hello\n"}, "Say hello", 3),
        ("bare", "bare", 0),
    ],
)
def test_text_columns(tmp_path: Path, row: Any, text: str, prompt_chars: int) -> None:
    for name, content in (("x.jsonl", [row]), ("x.json", json.dumps([row]))):
        loaded = read_texts(write(tmp_path, name, content))
        assert loaded.items == (Text(text, prompt_chars),)
    if prompt_chars:
        assert text[:prompt_chars].rstrip() in ("Question: Who {x}?\nAnswer:", "Say", "Say:")


def test_field_dotted_and_nested(tmp_path: Path) -> None:
    rows = [{"prompt": {"text": "a b", "toxicity": 0.1}}, {"x.y": "c", "prompt": {"text": "d"}}]
    path = write(tmp_path, "x.jsonl", rows)
    assert texts_of(read_texts(path, field="prompt.text")) == ["a b", "d"]
    loaded = read_texts(write(tmp_path, "y.jsonl", rows[1:]), field="x.y")
    assert texts_of(loaded) == ["c"]


def test_csv_cells_may_hold_lines_and_be_large(tmp_path: Path) -> None:
    large = "y" * 200_000
    path = write(tmp_path, "x.csv", f'id,text\r\n1,"two\r\nlines"\r\n\r\n2,{large}\r\n')
    before = csv.field_size_limit()
    assert texts_of(read_texts(path)) == ["two\nlines", large]
    assert csv.field_size_limit() == before


def test_csv_lost_quote_is_named(tmp_path: Path) -> None:
    # The merged record has the right number of columns: only its quotes tell.
    good = "".join(f'"q{i}","t{i}"\n' for i in range(6))
    path = write(tmp_path, "x.csv", '"id","text"\n' + good + '"lost,"x"\n"q8","t8\n"q9","t9"\n')
    loaded = read_texts(path)
    assert len(loaded.items) == 6
    assert [one.row for one in loaded.skipped] == [8, 9]
    assert "a quote is not closed: it joins lines 9 to 10" in str(loaded)


def test_tsv_quotes_do_not_join_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "x.tsv", 'a\ttext\n1\t"open\n2\t"in ""all"""\n3\tx "y"\n')
    assert texts_of(read_texts(path)) == ['"open', 'in "all"', 'x "y"']


def test_skipped_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"text {i}"} for i in range(20)]
    rows[3], rows[5], rows[7], rows[9] = {"text": ""}, {"text": "text 1"}, {"text": 5}, {"other": 1}
    path = write(tmp_path, "x.jsonl", rows)
    path.write_text(path.read_text() + '\n{"text": \n\n["a"]\n{"text": "\\ud800"}')
    loaded = read_texts(path)
    assert len(loaded.items) == 16
    assert [(one.row, one.reason) for one in loaded.skipped] == [
        (4, "no text"),
        (6, "duplicate of row 2"),
        (8, "text is a number, not text"),
        (10, "no text column"),
        (21, "not JSON"),
        (23, "not a JSON object"),
        (24, "text holds half a surrogate pair (a broken \\u escape)"),
    ]
    assert "\n" not in str(loaded)
    assert str(loaded).endswith(
        "7 of 23 rows skipped: row 4 (no text), row 6 (duplicate of row 2), "
        "row 8 (text is a number, not text), …"
    )


def test_loaded_says_where_from(tmp_path: Path) -> None:
    path = write(tmp_path, "x.txt", "a\nb")
    loaded = read_texts(str(path))
    assert loaded.source == str(path)
    assert loaded.sha256 == hashlib.sha256(b"a\nb").hexdigest()
    assert str(loaded).endswith("2 rows, none skipped")


def test_min_chars_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "x.txt", "abc\na\nabcd\nabcde")
    loaded = read_texts(path, min_chars=3, limit=2)
    assert texts_of(loaded) == ["abc", "abcd"]
    assert loaded.skipped == (Skipped(2, "shorter than 3 characters"),)
    assert loaded.sha256 == read_texts(path).sha256


def test_deep_json_does_not_crash(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"text": "a"}\n{"text": "b"}\n' + "[" * 100_000)
    assert len(read_texts(path).items) == 2


# Questions


def test_tofu_question(tmp_path: Path) -> None:
    bare = {key: value for key, value in TOFU.items() if key != "paraphrased_answer"}
    loaded = read_questions(write(tmp_path, "x.jsonl", [TOFU, bare]))
    prompt = "Question: Who?\nAnswer:"
    assert loaded.items == (
        Question(prompt, ("It is Ann.", "It is Bo.", "It is Cy."), 0, "Ann."),
        Question(prompt, ("Ann.", "It is Bo.", "It is Cy."), 0, "Ann."),
    )


@pytest.mark.parametrize(
    ("header", "answer"),
    [(MMLU, "2"), (MMLU, "C"), (MMLU, "c"), (MMLU, " C "), ("", "2"), ("", "C"), ("", " C ")],
)
def test_mmlu_csv(tmp_path: Path, answer: str, header: str) -> None:
    loaded = read_questions(write(tmp_path, "x.csv", f'{header}"Who, now?",w,x,y,z,{answer}\n'))
    assert loaded.items == (Question("Question: Who, now?\nAnswer:", ("w", "x", "y", "z"), 2, "y"),)


@pytest.mark.parametrize("answer", [1, "1", "B"])
def test_wmdp_question(tmp_path: Path, answer: Any) -> None:
    rows = [{"question": "Q?", "choices": ["x", "y"], "answer": answer}]
    (one,) = read_questions(write(tmp_path, "x.json", json.dumps(rows))).items
    assert (one.choices, one.answer, one.truth, one.chance) == (("x", "y"), 1, "y", 0.5)


WMDP = {"question": "Q?", "choices": ["x", "y", "z"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": ["x"]}, "fewer than two choices"),
        ({"choices": []}, "no choices"),
        ({"choices": ["x", "x ", "z"]}, "two choices are the same"),
        ({"choices": "xyz"}, "choices is of another kind, not a list"),
        ({"choices": ["x", 3]}, "choices[1] is a number, not text"),
        ({"choices": ["x", ""]}, "no choices[1]"),
        ({"answer": 3}, "answer 3 is not 0-2 or A-C"),
        ({"answer": -1}, "answer -1 is not 0-2 or A-C"),
        ({"answer": "D"}, "answer 'D' is not 0-2 or A-C"),
        ({"answer": "²"}, "answer '²' is not 0-2 or A-C"),
        ({"answer": True}, "answer True is not 0-2 or A-C"),
        ({"answer": None}, "answer None is not 0-2 or A-C"),
        ({"answer": 1.5}, "answer 1.5 is not 0-2 or A-C"),
        ({"answer": ""}, "no answer"),
        ({"question": "  "}, "no question"),
        ({"question": 7}, "question is a number, not text"),
        ({"perturbed_answer": "one"}, "perturbed_answer is of another kind, not a list"),
        ({"perturbed_answer": [], "answer": "a"}, "fewer than two choices"),
        ({"perturbed_answer": ["a"], "answer": "a"}, "two choices are the same"),
    ],
)
def test_bad_question_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    good = [WMDP, {**WMDP, "question": "Other?"}]
    loaded = read_questions(write(tmp_path, "x.jsonl", [*good, {**WMDP, **change}]))
    assert (len(loaded.items), loaded.skipped) == (2, (Skipped(3, reason),))


def test_bad_csv_question_rows(tmp_path: Path) -> None:
    good = "".join(f"q{i},a,b,c,d,0\n" for i in range(5))
    bad = "q,a,b,c,d\nq,a,b,c,d,e,0\nq,a,b,,d,0\nq0,a,b,c,d,0\n"
    loaded = read_questions(write(tmp_path, "x.csv", MMLU + good + bad))
    assert [str(one) for one in loaded.skipped] == [
        "row 7 (5 columns where the header has 6)",
        "row 8 (7 columns where the header has 6)",
        "row 9 (no C)",
        "row 10 (duplicate of row 2)",
    ]


# Sources that cannot be read at all: what, got, allowed, fix

BAD_FILES: list[tuple[str, str | bytes | list[Any], tuple[str, ...]]] = [
    ("x.txt", "", ("is empty", "no rows", "right file")),
    ("x.txt", " \n\n", ("is empty",)),
    ("x.csv", "", ("is empty",)),
    ("x.csv", "a,text\n", ("is empty",)),
    ("x.json", "[]", ("is empty",)),
    ("x.jsonl", b"\xef\xbb\xbf", ("is empty",)),
    ("x.txt", b"caf\xe9 au lait", ("not UTF-8", "0xe9 at byte offset 3", "save as UTF-8")),
    ("x.csv", b"\xff\xfea\0", ("not UTF-8", "byte offset 0", "save as UTF-8")),
    ("x.txt", b"a\0b", ("not a text file", "zero byte at byte offset 1", "UTF-16")),
    ("x.json", "{", ("cannot be read as JSON rows", "not JSON", "a list of objects", ".jsonl")),
    ("x.json", '{"a": 1}', ("not a list", "wrap the objects in a list")),
    ("x.jsonl", "a\nb\nc", ("no usable row", "3 of 3 rows", "row 1 (not JSON)", "right file")),
    (
        "x.jsonl",
        '{"text": "a"}\nb\nc',
        ("Most rows", "2 of 3 rows", "row 2 (not JSON)", "columns found: text"),
    ),
    (
        "x.jsonl",
        [{"body": "long words here", "id": "1"}],
        ("no usable row", "row 1 (no text column)", "body, id", "question + answer", "'body'"),
    ),
    (
        "x.jsonl",
        [{"id": "1", "prompt": {"text": "a b"}, "continuation": {"text": "c"}}],
        ("columns found: id, prompt.text, continuation.text", "field='prompt.text'"),
    ),
    ("x.jsonl", [{"prompt": {"a": "b"}, "response": "c"}], ("prompt is an object, not text",)),
    ("x.csv", "a;text\n1;2\n", ("columns found: a;text",)),
    ("x.csv", MMLU + "q,a,b,c,d,0\n", ("multiple-choice row", "field='question'")),
    ("x.csv", "a,text,text\n1,2,3\n", ("two columns of one name", "'text'", "rename one")),
    ("x.csv", "a,text\n1\n2\n3,b\n", ("Most rows", "2 of 3 rows", "1 columns where")),
    ("x.pkl", b"x", ("is refused", "the suffix .pkl", ".jsonl", "pickle can run code")),
    ("x.PT", b"x", ("is refused", "pickle can run code")),
    ("pytorch_model.bin", b"x", ("is refused", "pickle can run code")),
    ("x.gz", b"x", ("of no known format", "'.gz'", ".csv", "unpack")),
    ("x", b"x", ("of no known format", "the suffix ''")),
    ("x.parquet", b"PAR1", ("cannot be read as parquet", "whole parquet file", "again")),
]


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES)
def test_bad_text_files(
    tmp_path: Path, name: str, content: str | bytes | list[Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        read_texts(write(tmp_path, name, content))
    message = str(caught.value)
    assert name in caught.value.what
    assert all(part in message for part in parts), message
    assert all((caught.value.got, caught.value.allowed, caught.value.fix))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.txt", "some\ntext", ("no usable row", "no question column", "columns found: text")),
        ("x.jsonl", [{"question": "Q", "answer": "A"}], ("no choices", "A + B")),
        ("x.csv", "question,answer\nq,1\n", ("no choices", "columns found: question, answer")),
        ("x.csv", MMLU + "q,a,b,c,d,7\n", ("answer '7' is not 0-3 or A-D", "right file")),
        ("x.pickle", b"", ("pickle can run code",)),
    ],
)
def test_bad_question_files(
    tmp_path: Path, name: str, content: str | bytes | list[Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(write(tmp_path, name, content))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_wrong_field_names_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "id,comment_text\n1,some words\n")
    with pytest.raises(DataError, match="no column 'coment'") as caught:
        read_texts(path, field="coment")
    assert "columns found: id, comment_text" in caught.value.got
    assert "field='comment_text'" in caught.value.fix


@pytest.mark.parametrize("below", [{"limit": 0}, {"min_chars": 0}])
def test_settings_below_one(tmp_path: Path, below: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        read_texts(write(tmp_path, "x.txt", "a"), **below)  # type: ignore[arg-type]


def test_missing_file_proposes_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "forget05.jsonl", "")
    with pytest.raises(DataError, match=r"No such file.*forget5\.jsonl") as caught:
        read_texts(tmp_path / "forget5.jsonl")
    assert str(tmp_path / "forget05.jsonl") in caught.value.fix


def test_missing_name_without_slash_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "forget", "")
    (tmp_path / "data").mkdir()
    for name, fix in (("forgot", "did you mean 'forget'?"), ("data/x", "check"), ("a/b/c", "path")):
        with pytest.raises(DataError, match="No such file") as caught:
            read_texts(name)
        assert fix in caught.value.fix


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "x.txt", "a")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_texts(path)
    assert "Permission denied" in caught.value.got and "permissions" in caught.value.fix


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sources.SUFFIXES), st.binary(max_size=80) | FRAGMENTS.map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = write(tmp_path, f"x{suffix}", content)
    for read in (read_texts, read_questions):
        try:
            loaded = read(path)
        except DataError as error:
            assert all((error.what, error.got, error.allowed, error.fix))
        else:
            assert loaded.items and str(loaded)


# Folders, parquet and the hub

ROWS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


def test_saved_folder_and_parquet(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    table.to_parquet(tmp_path / "x.parquet")
    saved = read_texts(tmp_path / "saved")
    assert texts_of(saved) == ["a", "b"]
    assert read_texts(tmp_path / "splits").items == saved.items
    assert read_texts(tmp_path / "splits").sha256 == saved.sha256
    assert read_texts(tmp_path / "x.parquet").items == saved.items


def test_saved_folder_with_several_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(one=table, two=table).save_to_disk(tmp_path / "x")
    with pytest.raises(DataError, match="several splits") as caught:
        read_texts(tmp_path / "x")
    assert caught.value.got == "one, two"


def test_broken_saved_folder(tmp_path: Path) -> None:
    write(tmp_path, "state.json", "{}")
    with pytest.raises(DataError, match="cannot be read as a folder saved by datasets"):
        read_texts(tmp_path)


def test_folder_of_shards(tmp_path: Path) -> None:
    for shard, row in enumerate(ROWS):
        write(tmp_path, f"train-0000{shard}-of-00002.jsonl", [row])
        table = datasets.Dataset.from_list([row])
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "parquet" / f"train-0000{shard}-of-00002.parquet")
    write(tmp_path, "README.txt", "not data")
    loaded = read_texts(tmp_path)
    assert texts_of(loaded) == ["a", "b"]
    assert loaded.sha256 == read_texts(tmp_path / "parquet").sha256


def test_folder_of_several_data_sets(tmp_path: Path) -> None:
    write(tmp_path, "forget.jsonl", ROWS[:1])
    write(tmp_path, "retain.jsonl", ROWS[1:])
    with pytest.raises(DataError, match="several data sets") as caught:
        read_texts(tmp_path)
    assert caught.value.got == "forget.jsonl, retain.jsonl"
    assert str(tmp_path / "forget.jsonl") in caught.value.fix


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an empty folder"):
        read_texts(tmp_path)
    write(tmp_path, "picture.png", b"")
    with pytest.raises(DataError, match=r"No data in the folder") as caught:
        read_texts(tmp_path)
    assert caught.value.got == "picture.png"


def test_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str | None) -> Any:
        asked.append((path, config, split))
        table = datasets.Dataset.from_list(ROWS)
        return table if split else datasets.DatasetDict(test=table)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("cais/wmdp", "cais/wmdp:wmdp-bio", "cais/wmdp:wmdp-bio:test", "cais/wmdp::test"):
        assert texts_of(read_texts(name)) == ["a", "b"]
    assert asked == [
        ("cais/wmdp", None, None),
        ("cais/wmdp", "wmdp-bio", None),
        ("cais/wmdp", "wmdp-bio", "test"),
        ("cais/wmdp", None, "test"),
    ]


def test_hub_name_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="cannot be loaded from the Hugging Face hub") as caught:
        read_texts("owner/name")
    assert "Couldn't reach" in caught.value.got and "log in" in caught.value.fix


def test_no_pickle_suffix_is_readable() -> None:
    assert not sources.PICKLES & set(sources.SUFFIXES)


def test_the_end_of_text_mark_separates_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n", encoding="utf-8")
    assert [text.text for text in read_texts(path).items] == ["one\nmore", "two"]
