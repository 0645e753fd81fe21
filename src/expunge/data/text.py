"""The kinds of data the package works with: texts, questions, pairs of wordings, labelled texts.

All are frozen values, made by `expunge.data.sources` and split by `expunge.data.splits`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Text:
    """A piece of text to forget or to retain.

    Attributes:
        text: the whole text, without special tokens.
        prompt_chars: how many leading characters are only context: an answer's nats/token are
            measured after them. 0: the whole text counts.
    """

    text: str
    prompt_chars: int = 0

    @property
    def content(self) -> str:
        """What makes two texts the same: used for splits and overlap."""
        return self.text


@dataclass(frozen=True)
class Question:
    """A question with its possible answers.

    Attributes:
        prompt: everything before the answer, without a trailing space.
        choices: possible answers; each is scored as ``prompt + " " + choice``.
        answer: index of the right one in ``choices``.
        truth: the true wording whose nats/token are measured. TOFU asks about a paraphrase among
            wrong ones but measures the original answer; elsewhere it is ``choices[answer]``.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    truth: str

    @property
    def content(self) -> str:
        """What makes two questions the same: the prompt and the true wording."""
        return f"{self.prompt} {self.truth}"

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.choices)


@dataclass(frozen=True)
class Pair:
    """Two wordings of one content.

    Attributes:
        toxic, neutral: whole texts, without special tokens.
    """

    toxic: str
    neutral: str

    @property
    def content(self) -> str:
        """The toxic wording: its other paraphrases belong to the same split."""
        return self.toxic

    @property
    def opening(self) -> str:
        """The words that both wordings begin with, as the neutral one writes them; '' if none.

        Words end at whitespace and are compared casefolded. The opening is a prefix of
        ``neutral``, all of it where the toxic wording only adds to its end.
        """
        end = 0
        words = zip(_words(self.toxic), _words(self.neutral), strict=False)
        for toxic, neutral in words:
            if toxic[0].casefold() != neutral[0].casefold():
                break
            end = neutral.end()
        return self.neutral[:end]

    @property
    def after_opening(self) -> Text:
        """The neutral wording, of which only what follows the opening is measured."""
        return Text(self.neutral, prompt_chars=len(self.opening))


@dataclass(frozen=True)
class Labelled:
    """A text of one of two classes."""

    text: str
    toxic: bool

    @property
    def content(self) -> str:
        """The text alone: one text under two labels is still one text."""
        return self.text


def _words(text: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"\S+", text)
