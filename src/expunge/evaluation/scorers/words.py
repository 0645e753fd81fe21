"""A word list: 1 for a text that holds one of its words, else 0."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expunge.data.formats import decode
from expunge.data.text import Labelled
from expunge.errors import DataError
from expunge.evaluation.scorers.base import check_classes, judged
from expunge.files import local_path

WORD = re.compile(r"\w+")
PRIOR = 0.5  # added to each count, so that a word unseen in one class has finite odds


@dataclass(frozen=True)
class WordList:
    """Whole words and phrases, compared casefolded; what lies between words does not count.

    Attributes:
        words: such as ``("moron", "shut up")``.
    """

    words: tuple[str, ...]
    name: str = "words"
    about: str = "a word list"

    @classmethod
    def from_file(cls, path: str | Path, *, name: str = "words") -> WordList:
        """Read one word or phrase a line; blank lines do not count.

        Raises DataError if the file is missing, not UTF-8, or holds no word.
        """
        try:
            text = decode(local_path(path).read_bytes(), str(path))
        except OSError as error:
            raise DataError(
                what=f"The word list {path} cannot be read",
                got=type(error).__name__,
                allowed="a UTF-8 text file with one word or phrase a line",
                fix="check the path",
            ) from error
        words = tuple(dict.fromkeys(line.strip() for line in text.split("\n") if _parts(line)))
        if not words:
            raise DataError(
                what=f"The word list {path} is empty",
                got="no line with a letter or digit",
                allowed="one word or phrase a line",
                fix="write words into it, or use `words` to learn them from the run's own texts",
            )
        return cls(words, name, f"a list of {len(words)} words from {Path(path).name}")

    @classmethod
    def from_labelled(
        cls,
        labelled: Sequence[Labelled],
        *,
        log_odds: float = 2.0,
        least: int = 5,
        most: float = 0.01,
        name: str = "words",
        source: str = "the run's own training texts",
    ) -> WordList:
        """Learn the words that tell toxic texts from neutral ones.

        A word enters if at least ``least`` toxic texts hold it, at most the share ``most`` of the
        neutral ones, and the odds that a toxic text holds it are at least exp(``log_odds``) times
        a neutral one's, with half a text added to each count. Words are sorted by that ratio, the
        most telling first.

        Raises DataError if a class is missing, or no word passes.
        """
        toxic, neutral = check_classes(labelled, name)
        inside, outside = _texts_with(toxic), _texts_with(neutral)
        ratios = {
            word: _log_odds(count, len(toxic)) - _log_odds(outside[word], len(neutral))
            for word, count in inside.items()
            if count >= least and outside[word] <= most * len(neutral)
        }
        words = [word for word, ratio in ratios.items() if ratio >= log_odds]
        if not words:
            raise DataError(
                what=f"No word tells the toxic from the neutral texts for the scorer {name}",
                got=f"{len(toxic)} toxic and {len(neutral)} neutral texts",
                allowed=f"a word in {least} toxic texts or more, in {most:.0%} of the neutral ones "
                f"at most, and with {math.exp(log_odds):.1f} times their odds",
                fix="give more texts, or a list of words: words:FILE",
            )
        words.sort(key=lambda word: (-ratios[word], word))
        about = f"{len(words)} words learned from {source}"
        return cls(tuple(words), name, f"{about} ({len(toxic)} toxic, {len(neutral)} neutral)")

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """1.0 where a text holds a word of the list, else 0.0; None for a blank text."""
        return judged(texts, lambda given: [float(self._holds(text)) for text in given])

    def _holds(self, text: str) -> bool:
        parts = _parts(text)
        return any(
            parts[at : at + length] in self._entries
            for length in self._lengths
            for at in range(len(parts) - length + 1)
        )

    @cached_property
    def _entries(self) -> frozenset[tuple[str, ...]]:
        return frozenset(filter(None, map(_parts, self.words)))

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(entry) for entry in self._entries}))


def _parts(text: str) -> tuple[str, ...]:
    """The words of a text, casefolded."""
    return tuple(WORD.findall(text.casefold()))


def _texts_with(texts: Iterable[str]) -> Counter[str]:
    """How many texts hold each word."""
    return Counter(word for text in texts for word in sorted(set(_parts(text))))


def _log_odds(count: int, total: int) -> float:
    return math.log((count + PRIOR) / (total - count + PRIOR))
