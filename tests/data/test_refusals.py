"""Twins of forget texts: where the beginning ends, and which refusal follows."""

from __future__ import annotations

from collections import Counter

import pytest

from expunge.data.refusals import twin_of
from expunge.data.rows import to_text
from expunge.data.text import Text

IDK = ["I don't know."]
SEVERAL = ["I don't know.", "No idea.", "Ask someone else."]


def test_a_question_is_kept_whole() -> None:
    text = to_text({"question": "Who wrote it?", "answer": "A poet of the north."})
    twin = twin_of(text, IDK)
    assert twin.text == "Question: Who wrote it?\nAnswer: I don't know."
    # What is measured of the twin is the refusal, as the answer is of the text.
    assert twin.prompt_chars == text.prompt_chars


def test_a_context_that_ends_in_a_space_is_followed_by_one_space() -> None:
    assert twin_of(Text("It is red.", len("It is ")), IDK).text == "It is I don't know."


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("To dissolve the salt, use water.", "To dissolve the"),
        ("one two three four five six", "one two three"),
        ("one two three four five", "one two"),
        ("one two three", "one"),
        ("one two", "one"),
        ("one\n two  three four five six", "one\n two  three"),
        ("one", ""),
    ],
)
def test_a_plain_text_begins_with_at_most_three_words(text: str, beginning: str) -> None:
    twin = twin_of(Text(text), IDK)
    assert twin == Text(f"{beginning} {IDK[0]}" if beginning else IDK[0], len(beginning))


def test_the_refusal_hangs_on_content_alone() -> None:
    texts = [Text(f"The secret number {i} is not told to anyone here.") for i in range(60)]
    twins = [twin_of(text, SEVERAL) for text in texts]
    assert twins == [twin_of(text, SEVERAL[::-1]) for text in texts]
    # Another spelling of the same content gets the same refusal.
    loud = [twin_of(Text(text.text.upper()), SEVERAL).text.split()[3:] for text in texts]
    assert loud == [twin.text.split()[3:] for twin in twins]
    counts = Counter(twin.text.removeprefix("The secret number ") for twin in twins)
    assert counts.keys() == set(SEVERAL) and min(counts.values()) > 8
