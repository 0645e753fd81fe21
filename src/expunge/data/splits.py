"""Splits that depend on content alone, and forget content that hides in the retain set."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, Literal, Protocol, TypeVar

from expunge.errors import DataError, RecipeError

CONTAINED_CHARS = 40  # shorter texts occur inside others by chance
SHOWN_TEXTS, SHOWN_CHARS = 3, 60


class HasContent(Protocol):
    """What can be split and compared: `Text`, `Question`."""

    @property
    def content(self) -> str:
        """What makes two items the same."""


T = TypeVar("T", bound=HasContent)


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Disjoint parts of one data set, each in the original order."""

    train: tuple[T, ...]
    validation: tuple[T, ...]
    test: tuple[T, ...]


def normalise(content: str) -> str:
    """The form in which contents are compared: NFKC, case folded, runs of whitespace one space."""
    return " ".join(unicodedata.normalize("NFKC", content).casefold().split())


def split_by_content(
    items: Sequence[T], *, train: float, validation: float, test: float, seed: int
) -> Splits[T]:
    """Split by a hash of seed and normalised content.

    The distinct contents are ranked by their hash and cut at the fractions, so neither the order
    of the rows nor repeated rows matter, and rows of one content stay together. Each part with a
    fraction above 0 gets something as soon as there are as many distinct contents as such parts.
    Adding rows moves only the few items whose ranks lie beside a cut.

    Args:
        items: what to split.
        train, validation, test: fractions of the distinct contents; they sum to 1.
        seed: another seed gives another split.

    Raises:
        RecipeError: a fraction is negative, or they do not sum to 1 within 1e-6.
    """
    fractions = (train, validation, test)
    if not all(fraction >= 0 for fraction in fractions) or not abs(sum(fractions) - 1) <= 1e-6:
        raise RecipeError(
            what="The split fractions do not make a whole",
            got=f"train {train}, validation {validation}, test {test}: sum {sum(fractions):g}",
            allowed="three numbers from 0 to 1 that sum to 1",
            fix="for example train 0.8, validation 0.1, test 0.1",
        )
    contents = [normalise(item.content) for item in items]
    ranked = sorted(set(contents), key=lambda content: (_hash(seed, content), content))
    sizes = _sizes(len(ranked), fractions)
    part_of: dict[str, int] = {}
    for rank, content in enumerate(ranked):
        part_of[content] = 0 if rank < sizes[0] else 1 if rank < sizes[0] + sizes[1] else 2
    parts: tuple[list[T], list[T], list[T]] = ([], [], [])
    for item, content in zip(items, contents, strict=True):
        parts[part_of[content]].append(item)
    return Splits(*map(tuple, parts))


def find_overlap(
    forget: Sequence[HasContent], retain: Sequence[HasContent]
) -> list[tuple[int, int]]:
    """Pairs (index in forget, index in retain) of shared content, in order.

    Shared: the normalised contents are equal, or a forget content of at least 40 normalised
    characters lies whole inside the retain content.
    """
    contents = [normalise(item.content) for item in forget]
    documents = [normalise(item.content) for item in retain]
    # The words of a contained text stand whole in the document, except perhaps its first and its
    # last, which may continue there. So only documents with its rarest inner word are searched.
    inner = [
        set(content.split()[1:-1]) if len(content) >= CONTAINED_CHARS else set()
        for content in contents
    ]
    vocabulary = set().union(*inner)
    with_word: dict[str, list[int]] = defaultdict(list)
    same: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        same[document].append(index)
        for word in vocabulary.intersection(document.split()):
            with_word[word].append(index)
    pairs: list[tuple[int, int]] = []
    for index, content in enumerate(contents):
        found = set(same[content]) if content in same else set()
        if len(content) >= CONTAINED_CHARS:
            rarest = min((with_word.get(word, []) for word in inner[index]), key=len, default=None)
            candidates = range(len(documents)) if rarest is None else rarest
            found.update(place for place in candidates if content in documents[place])
        pairs += [(index, place) for place in sorted(found)]
    return pairs


def separate(
    forget: Sequence[HasContent], retain: Sequence[T], *, on_overlap: Literal["refuse", "drop"]
) -> tuple[tuple[T, ...], int]:
    """The retain set without what it shares with the forget set, and how many items that cost.

    Raises:
        DataError: they overlap and ``on_overlap`` is ``refuse``.
        RecipeError: ``on_overlap`` is neither ``refuse`` nor ``drop``.
    """
    if on_overlap not in ("refuse", "drop"):
        raise RecipeError(
            what="Unknown way to treat an overlap",
            got=f"on_overlap={on_overlap!r}",
            allowed="refuse, drop",
            fix="use 'drop' to remove shared texts from the retain set",
        )
    shared = sorted({place for _, place in find_overlap(forget, retain)})
    if shared and on_overlap == "refuse":
        shown = [normalise(retain[place].content)[:SHOWN_CHARS] for place in shared[:SHOWN_TEXTS]]
        raise DataError(
            what="The retain set holds forget content",
            got=f"{len(shared)} of {len(retain)} retain items: {', '.join(map(repr, shown))}"
            + (", …" if len(shared) > SHOWN_TEXTS else ""),
            allowed="sets that share no text",
            fix="remove them from one of the two files, or set on_overlap to drop",
        )
    dropped = set(shared)
    kept = tuple(item for place, item in enumerate(retain) if place not in dropped)
    return kept, len(dropped)


def _hash(seed: int, content: str) -> bytes:
    return blake2b(f"{seed}\0{content}".encode(), digest_size=16).digest()


def _sizes(n: int, fractions: Sequence[float]) -> list[int]:
    """How many of ``n`` go to each fraction: the nearest whole numbers, none empty if possible."""
    sizes = [int(n * fraction) for fraction in fractions]
    wanted = [part for part, fraction in enumerate(fractions) if fraction > 0]
    by_remainder = sorted(wanted, key=lambda part: sizes[part] - n * fractions[part])
    while sum(sizes) < n:
        sizes[by_remainder[0]] += 1
        by_remainder.append(by_remainder.pop(0))
    for part in wanted:
        largest = max(wanted, key=lambda other: sizes[other])
        if sizes[part] == 0 and sizes[largest] > 1:
            sizes[part], sizes[largest] = 1, sizes[largest] - 1
    return sizes
