"""Which texts each step reads."""

from __future__ import annotations

from random import Random
from statistics import correlation

import pytest

from expunge.data.tokens import training_batches
from expunge.training.order import Batches

BATCH, SEED = 4, 3


def lengths(n: int, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randint(5, 60) for _ in range(n)]


FORGET, RETAIN = lengths(80, seed=1), lengths(80, seed=2)


def longest(batches: Batches, steps: range) -> list[tuple[int, int]]:
    """Longest forget and longest retain text of each step of one topic."""
    found = []
    for step in steps:
        _, forget, retain = batches.at(step)
        found.append((max(FORGET[i] for i in forget), max(RETAIN[i] for i in retain)))
    return found


def rises(pairs: list[tuple[int, int]]) -> bool:
    """Whether no shorter retain batch stands beside longer forget texts."""
    return all(r <= s for f, r in pairs for g, s in pairs if f < g)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_of_either_side_reads_each_text_once(epoch: int) -> None:
    batches = Batches([FORGET], RETAIN, BATCH, SEED)
    steps = [batches.at(step) for step in range(20 * epoch, 20 * epoch + 20)]
    for side in (1, 2):
        assert sorted(i for step in steps for i in step[side]) == list(range(80))


def test_batches_are_those_of_the_shuffle() -> None:
    """Retain batches change places within their epoch, no more; forget batches keep theirs."""
    batches = Batches([FORGET], RETAIN, BATCH, SEED)
    for epoch in (0, 1):
        steps = [batches.at(step) for step in range(20 * epoch, 20 * epoch + 20)]
        forget, retain = (
            training_batches(80, batch_size=BATCH, seed=seed * 100_003 + epoch, lengths=own)
            for seed, own in ((SEED, FORGET), (SEED + 1, RETAIN))
        )
        assert [step[1] for step in steps] == forget
        assert sorted(step[2] for step in steps) == sorted(retain)
        assert [step[2] for step in steps] != retain


@pytest.mark.parametrize("epoch", [0, 1])
def test_long_retain_texts_stand_beside_long_forget_texts(epoch: int) -> None:
    found = longest(Batches([FORGET], RETAIN, BATCH, SEED), range(20 * epoch, 20 * epoch + 20))
    assert rises(found)
    # Both sides are drawn alike, so equal ranks are nearly equal lengths.
    assert sum(abs(one - other) for one, other in found) / len(found) < 3


def test_epochs_differ() -> None:
    batches = Batches([FORGET], RETAIN, BATCH, SEED)
    for side in (1, 2):
        assert batches.at(0)[side] != batches.at(20)[side]


@pytest.mark.parametrize("n_retain", [24, 400])
def test_sides_of_unequal_size(n_retain: int) -> None:
    retain = lengths(n_retain, seed=4)
    batches = Batches([FORGET], retain, BATCH, SEED)
    steps = [batches.at(step) for step in range(n_retain // BATCH)]
    assert sorted(i for _, _, texts in steps for i in texts) == list(range(n_retain))
    pairs = [(max(FORGET[i] for i in f), max(retain[i] for i in r)) for _, f, r in steps]
    assert rises(pairs)


def test_topics_alternate_each_at_its_own_pace() -> None:
    topics = [FORGET, lengths(40, seed=5)]
    batches = Batches(topics, RETAIN, BATCH, SEED)
    for topic, own in enumerate(topics):
        alone = Batches([own], RETAIN, BATCH, SEED)
        for turn in range(25):
            assert batches.at(2 * turn + topic)[:2] == (topic, alone.at(turn)[1])


def test_retain_texts_rank_as_the_forget_texts_of_their_step_whatever_the_topic() -> None:
    topics = [FORGET, lengths(40, seed=5)]
    batches = Batches(topics, RETAIN, BATCH, SEED)
    steps = [batches.at(step) for step in range(20)]
    pairs = [(max(topics[t][i] for i in f), max(RETAIN[i] for i in r)) for t, f, r in steps]
    assert rises(pairs)


@pytest.mark.parametrize("widths", [[7], [7, 9]])
def test_chance_decides_among_forget_texts_of_one_length(widths: list[int]) -> None:
    """An epoch of texts that are all cut at one length must not go from short to long."""
    forget, retain = widths * (400 // len(widths)), lengths(400, seed=6)
    batches = Batches([forget], retain, BATCH, SEED)
    steps = [batches.at(step) for step in range(100)]
    for width in widths:
        found = [
            max(retain[i] for i in texts)
            for _, own, texts in steps
            if max(forget[i] for i in own) == width
        ]
        places = range(len(found))
        assert abs(correlation(places, found)) < 0.3


def test_the_same_seed_reads_the_same_from_any_step_on() -> None:
    one, other = (Batches([FORGET], RETAIN, BATCH, SEED) for _ in range(2))
    assert [other.at(step) for step in reversed(range(60))] == [one.at(step) for step in range(60)][
        ::-1
    ]
    assert one.at(0) != Batches([FORGET], RETAIN, BATCH, SEED + 1).at(0)
