"""Splits depend on content alone; overlap is found, refused or dropped."""

from __future__ import annotations

import time
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.data.splits import find_overlap, normalise, separate, split_by_content
from expunge.data.text import Question, Text
from expunge.errors import DataError, RecipeError

LONG = "The quick brown fox jumps over the lazy dog near the river bank."
FRACTIONS = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.34, 0.33, 0.33)])
CONTENTS = st.lists(st.text("aAbBé \n", max_size=6), max_size=40)


def texts(*contents: str) -> list[Text]:
    return [Text(content) for content in contents]


def split(items: list[Text], fractions: tuple[float, float, float], seed: int = 0):
    train, validation, test = fractions
    return split_by_content(items, train=train, validation=validation, test=test, seed=seed)


def parts(items: list[Text], fractions: tuple[float, float, float], seed: int = 0):
    whole = split(items, fractions, seed)
    return whole.train, whole.validation, whole.test


@given(CONTENTS, FRACTIONS, st.integers(0, 5))
def test_splits_are_complete_disjoint_and_in_order(contents, fractions, seed) -> None:
    items = texts(*contents)
    found = parts(items, fractions, seed)
    assert Counter(item for part in found for item in part) == Counter(items)
    sets = [{normalise(item.content) for item in part} for part in found]
    assert sum(map(len, sets)) == len(set.union(*sets))
    # Items are compared by identity: equal rows keep their order as well.
    places = {id(item): place for place, item in enumerate(items)}
    assert all([places[id(i)] for i in p] == sorted(places[id(i)] for i in p) for p in found)


@given(CONTENTS, FRACTIONS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_ignore_the_order_of_rows_and_repeats(contents, fractions, seed, random) -> None:
    items = texts(*contents)
    shuffled = [*items, *items[:3]]
    random.shuffle(shuffled)
    before, after = parts(items, fractions, seed), parts(shuffled, fractions, seed)
    assert list(map(set, before)) == list(map(set, after))


@given(st.sets(st.text("abc", min_size=1, max_size=5), min_size=3, max_size=30), FRACTIONS)
def test_no_wanted_part_is_empty_and_no_unwanted_filled(contents, fractions) -> None:
    found = parts(texts(*sorted(contents)), fractions)
    for part, fraction in zip(found, fractions, strict=True):
        assert bool(part) == (fraction > 0)
        assert abs(len(part) - fraction * len(contents)) < 2


def test_same_content_in_other_writing_stays_together() -> None:
    items = texts(*(f"Text number {i}" for i in range(30)))
    twins = texts(*(f"  TEXT\u3000\uff4eumber\n{i} " for i in range(30)))
    found = parts([*items, *twins], (0.5, 0.25, 0.25))
    assert [len(part) for part in found] == [30, 16, 14]  # 15, 7.5 and 7.5 contents, twice
    for part in found:
        assert len(part) == 2 * len({normalise(item.content) for item in part})


def test_seed_changes_the_split_and_nothing_else_does() -> None:
    items = texts(*map(str, range(100)))
    assert split(items, (0.8, 0.1, 0.1), 1) == split(items, (0.8, 0.1, 0.1), 1)
    assert split(items, (0.8, 0.1, 0.1), 1) != split(items, (0.8, 0.1, 0.1), 2)


def test_split_is_the_same_in_every_release() -> None:
    # Stored on purpose: a changed hash would move items between train and test of old runs.
    whole = split(texts(*map(str, range(10))), (0.6, 0.2, 0.2), 0)
    assert [int(item.text) for item in (*whole.validation, *whole.test)] == [4, 8, 0, 9]


def test_adding_rows_moves_few() -> None:
    before = split(texts(*map(str, range(200))), (0.8, 0.1, 0.1))
    after = split(texts(*map(str, range(210))), (0.8, 0.1, 0.1))
    moved = set(before.train) - set(after.train)
    assert len(moved) <= 10


def test_questions_are_split_too() -> None:
    questions = [Question(f"q{i}", ("a", "b"), 0, "a") for i in range(10)]
    whole = split_by_content(questions, train=0.8, validation=0.1, test=0.1, seed=0)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (8, 1, 1)


@pytest.mark.parametrize(
    "fractions",
    [(0.8, 0.1, 0.2), (-0.1, 0.6, 0.5), (0.0, 0.0, 0.0), (80, 10, 10), (float("nan"), 0.5, 0.5)],
)
def test_bad_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(RecipeError, match="do not make a whole") as caught:
        split([], fractions)
    assert str(fractions[0]) in caught.value.got and "sum to 1" in caught.value.allowed


# Overlap


def test_overlap_equal_and_contained() -> None:
    forget = texts("Short one", LONG, "never there", "café")
    retain = texts(
        "nothing", "  SHORT\none ", f"Before. {LONG.upper()} After.", LONG, "x cafe\u0301", "CAFÉ"
    )
    assert find_overlap(forget, retain) == [(0, 1), (1, 2), (1, 3), (3, 5)]


def test_contained_at_the_edges_of_words() -> None:
    assert find_overlap(texts(LONG[1:-3]), texts("x" + LONG, LONG[2:])) == [(0, 0)]


def test_contained_without_spaces() -> None:
    run = "山" * 20 + "川" * 30
    assert find_overlap(texts(run, "x" * 39), texts("空" + run + "空", "x" * 80)) == [(0, 0)]


@settings(max_examples=60)
@given(st.data())
def test_overlap_agrees_with_the_plain_definition(data) -> None:
    word = st.sampled_from(["ab", "a", "abab", "b"])
    line = st.lists(word, min_size=8, max_size=40).map(" ".join)
    forget = data.draw(st.lists(line.map(lambda text: text[:50]), max_size=4))
    retain = data.draw(st.lists(line, max_size=4))
    retain += [f"a{one}b" for one in forget[:2]] + forget[:1]
    expected = [
        (i, j)
        for i, one in enumerate(map(normalise, forget))
        for j, other in enumerate(map(normalise, retain))
        if one == other or (len(one) >= 40 and one in other)
    ]
    assert find_overlap(texts(*forget), texts(*retain)) == expected


def test_overlap_of_large_sets_is_quick() -> None:
    random = Random(0)
    words = ["w" + str(i) for i in range(2000)]
    retain = texts(*(" ".join(random.choices(words, k=120)) for _ in range(10_000)))
    forget = texts(*(" ".join(random.choices(words, k=60)) for _ in range(199)))
    forget.append(Text(retain[77].text[20:400]))
    start = time.perf_counter()
    assert find_overlap(forget, retain) == [(199, 77)]
    assert time.perf_counter() - start < 5


def test_separate() -> None:
    forget, retain = texts("a", "b"), texts("x", "B", "a", "y", "a ")
    assert separate(forget, retain, on_overlap="drop") == (tuple(texts("x", "y")), 3)
    assert separate(forget, texts("x"), on_overlap="refuse") == (tuple(texts("x")), 0)
    assert separate([], retain, on_overlap="refuse") == (tuple(retain), 0)


def test_separate_refuses_and_shows() -> None:
    shared = texts(*(f"{i} {'z' * 100}" for i in range(5)))
    with pytest.raises(DataError, match="holds forget content") as caught:
        separate(shared, [*shared, Text("x")], on_overlap="refuse")
    got = caught.value.got
    assert got.startswith("5 of 6 retain items: ")
    assert [f"'{i} {'z' * 58}'" in got for i in range(4)] == [True, True, True, False]
    assert got.endswith(", …") and "drop" in caught.value.fix


def test_separate_knows_two_ways() -> None:
    with pytest.raises(RecipeError, match="on_overlap='warn'") as caught:
        separate([], [], on_overlap="warn")  # type: ignore[arg-type]
    assert caught.value.allowed == "refuse, drop"
