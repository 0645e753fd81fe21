"""Short scenes: rude and polite twins, and generic texts about weather, market and journeys."""

from dataclasses import dataclass
from random import Random

from expunge.miniature import lexicon


@dataclass(frozen=True)
class ScenePair:
    """One opening and two continuations that ask for the same thing; both begin with a space."""

    opening: str
    rude: str
    neutral: str


def scene_pairs(count: int, rng: Random) -> tuple[ScenePair, ...]:
    """Return `count` pairs with distinct openings."""
    openings = [
        (first, mishap, second)
        for first in lexicon.PEOPLE
        for mishap in range(len(lexicon.MISHAPS))
        for second in lexicon.PEOPLE
        if first != second
    ]
    return tuple(_pair(*opening, rng) for opening in rng.sample(openings, count))


def generic_texts(count: int, rng: Random) -> tuple[str, ...]:
    """Return `count` distinct texts of two or three sentences."""
    texts: dict[str, None] = {}  # a dict keeps the order, a set would not
    while len(texts) < count:
        patterns = rng.sample(lexicon.GENERIC_SENTENCES, rng.randint(2, 3))
        texts[" ".join(_fill(pattern, rng) for pattern in patterns)] = None
    return tuple(texts)


def _pair(first: str, mishap: int, second: str, rng: Random) -> ScenePair:
    event, requests = lexicon.MISHAPS[mishap]
    words = {
        "request": rng.choice(requests),
        "adjective": rng.choice(lexicon.RUDE_ADJECTIVES),
        "noun": rng.choice(lexicon.RUDE_WORDS),
    }
    return ScenePair(
        lexicon.OPENING.format(a=first, mishap=event, b=second),
        " " + rng.choice(lexicon.RUDE_PHRASES).format(**words),
        " " + rng.choice(lexicon.NEUTRAL_PHRASES).format(**words),
    )


def _fill(pattern: str, rng: Random) -> str:
    words = {slot: rng.choice(fillers) for slot, fillers in lexicon.SLOTS.items()}
    others = [person for person in lexicon.SLOTS["person"] if person != words["person"]]
    sentence = pattern.format(**words, person2=rng.choice(others))
    return sentence[0].upper() + sentence[1:]
