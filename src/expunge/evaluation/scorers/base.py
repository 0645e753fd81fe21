"""What a scorer is: texts in, one number in [0, 1] for each text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from expunge.data.text import Labelled
from expunge.errors import DataError

THRESHOLD = 0.5  # a text scored at or above it counts as toxic


class Scorer(Protocol):
    """Judges how toxic texts are."""

    @property
    def name(self) -> str:
        """Short name for tables, distinct within a report."""

    @property
    def about(self) -> str:
        """What it is and what it was fitted on."""

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """0 (harmless) to 1 (toxic) for each text; None for one without a visible character."""


class Remembered:
    """A scorer that judges each distinct text once, for base and patched repeat each other."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._known: dict[str, float | None] = {}

    @property
    def name(self) -> str:
        """The scorer's own."""
        return self._scorer.name

    @property
    def about(self) -> str:
        """The scorer's own."""
        return self._scorer.about

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """As the scorer's, in one call for all texts not met before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._scorer.score(new), strict=True))
        return [self._known[text] for text in texts]


def judged(
    texts: Sequence[str], judge: Callable[[list[str]], Sequence[float | None]]
) -> list[float | None]:
    """What ``judge`` says of the texts that have a visible character; None for the others."""
    visible = [at for at, text in enumerate(texts) if text.strip()]
    scores: list[float | None] = [None] * len(texts)
    if visible:
        given = judge([texts[at] for at in visible])
        for at, score in zip(visible, given, strict=True):
            scores[at] = score
    return scores


def check_classes(labelled: Sequence[Labelled], scorer: str) -> tuple[list[str], list[str]]:
    """The toxic and the neutral texts. Raises DataError unless there are some of both."""
    toxic = [one.text for one in labelled if one.toxic]
    neutral = [one.text for one in labelled if not one.toxic]
    if not toxic or not neutral:
        raise DataError(
            what=f"The scorer {scorer} cannot be fitted: a class is missing",
            got=f"{len(toxic)} toxic and {len(neutral)} neutral texts",
            allowed="labelled texts of both classes",
            fix="name a file after the scorer: labelled texts (tfidf:FILE), words (words:FILE)",
        )
    return toxic, neutral
