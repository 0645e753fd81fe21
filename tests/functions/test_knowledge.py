"""Data in roles: what is trained on is never what is measured."""

from __future__ import annotations

import json

import pytest

from expunge.data.splits import normalise
from expunge.errors import DataError, RecipeError
from expunge.functions.base import DataSettings
from expunge.functions.knowledge import load_knowledge


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def question(subject, answer, others=("tin", "lead", "zinc")):
    return {"question": f"What is {subject}?", "choices": [answer, *others], "answer": 0}


def write_questions(path, rows):
    return write(path, [json.dumps(row) for row in rows])


@pytest.fixture
def files(tmp_path):
    return {
        "forget": (write(tmp_path / "forget.txt", [f"hazard number {i}" for i in range(40)]),),
        "retain": (write(tmp_path / "retain.txt", [f"garden number {i}" for i in range(100)]),),
    }


def contents(items):
    return {normalise(item.content) for item in items}


def assert_disjoint(data):
    trained = contents([*data.retain, *(text for topic in data.forget for text in topic)])
    validation, test = (data.measured[name] for name in ("validation", "test"))
    for split in (validation, test):
        for items in vars(split).values():
            assert not trained & contents(items)
    for role in vars(test):
        assert not contents(getattr(validation, role)) & contents(getattr(test, role))


def test_without_questions_shares_of_all_texts_are_held_back(files):
    data = load_knowledge(DataSettings(**files))
    assert [len(topic) for topic in data.forget] == [32]
    assert len(data.retain) == 80
    assert len(data.measured["test"].forget_texts) == 4
    assert len(data.measured["test"].perplexity_texts) == 10
    assert_disjoint(data)


def test_with_questions_all_forget_texts_are_trained_on(files, tmp_path):
    asked = write_questions(tmp_path / "q.jsonl", [question(f"x{i}", "gold") for i in range(10)])
    data = load_knowledge(DataSettings(**files, questions=asked))
    assert [len(topic) for topic in data.forget] == [40]
    assert len(data.measured["validation"].forget_questions) == 2
    assert len(data.measured["test"].forget_questions) == 8
    assert_disjoint(data)


def test_texts_for_perplexity_that_are_trained_on_are_dropped(files):
    data = load_knowledge(DataSettings(**files, text=files["retain"][0]))
    assert "80 texts for perplexity dropped that are trained on" in data.notes
    assert_disjoint(data)


def test_a_text_in_two_retain_sources_counts_once(files, tmp_path):
    again = write(tmp_path / "again.txt", [f"Garden  number {i}" for i in range(50, 150)])
    data = load_knowledge(DataSettings(**{**files, "retain": (files["retain"][0], again)}))
    assert any("50 texts dropped that came before" in note for note in data.notes)
    assert_disjoint(data)


def test_a_retain_text_that_answers_a_forget_question_is_refused(files, tmp_path):
    asked = write_questions(tmp_path / "q.jsonl", [question("x", "gold"), question("y", "iron")])
    leak = write(
        tmp_path / "leak.jsonl", [json.dumps({"question": "What is x?", "answer": "gold"})]
    )
    settings = {**files, "retain": (files["retain"][0], leak), "questions": asked}
    with pytest.raises(DataError, match="holds forget content"):
        load_knowledge(DataSettings(**settings))


def test_retain_texts_that_answer_a_retain_question_are_not_rehearsed(files, tmp_path):
    rows = [question(f"z{i}", "gold") for i in range(20)]
    asked = write_questions(tmp_path / "kept.jsonl", rows)
    texts = [json.dumps({"question": r["question"], "answer": "gold"}) for r in rows]
    more = [json.dumps({"question": f"What is w{i}?", "answer": "iron"}) for i in range(20)]
    source = write(tmp_path / "qa.jsonl", texts + more)
    data = load_knowledge(DataSettings(**{**files, "retain": (source,)}, retain_questions=asked))
    assert any("that answer a retain question held back" in note for note in data.notes)
    assert not any("What is z" in text.text for text in data.retain)
    assert_disjoint(data)


# ---- refusals


def test_each_forget_text_has_a_twin_that_refuses(files, tmp_path):
    plain = load_knowledge(DataSettings(**files))
    assert (plain.contrast, plain.paired) == ((), False)
    refusals = write(tmp_path / "idk.txt", ["I don't know.", "No idea."])
    data = load_knowledge(DataSettings(**files, refusals=refusals))
    assert data.paired and len(data.contrast) == len(data.forget[0])
    # Three words each, so the first of them is the beginning.
    assert {twin.text for twin in data.contrast} == {"hazard I don't know.", "hazard No idea."}
    assert all(twin.prompt_chars == len("hazard") for twin in data.contrast)
    assert data.hashes.keys() == {*plain.hashes, refusals}
    # Nothing else changes.
    assert (data.forget, data.retain, data.measured) == (plain.forget, plain.retain, plain.measured)


def test_refusals_of_several_topics_are_refused(files, tmp_path):
    refusals = write(tmp_path / "idk.txt", ["No idea."])
    second = write(tmp_path / "second.txt", ["danger one", "danger two"])
    settings = {**files, "forget": (*files["forget"], second)}
    with pytest.raises(RecipeError, match="one topic"):
        load_knowledge(DataSettings(**settings, refusals=refusals))


def test_a_file_without_refusals_is_refused(files, tmp_path):
    with pytest.raises(DataError, match="empty"):
        load_knowledge(DataSettings(**files, refusals=write(tmp_path / "idk.txt", [])))
