"""Twins of texts to forget: the same beginning, and then a refusal instead of the knowledge.

    twin_of(Text("Question: Who is X?\\nAnswer: A poet.", 25), ["I don't know."])

The use of refusals is TOFU's (arXiv:2401.06121, its "IDK" answers); what counts as the beginning of
a text without a question, and which refusal a text gets, is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

from expunge.data.splits import normalise
from expunge.data.text import Text

# Three words say what is asked about, and seldom what is known of it.
BEGINNING_WORDS = 3


def twin_of(text: Text, refusals: Sequence[str]) -> Text:
    """The text's beginning, a space and one of the refusals.

    The beginning is the text's context, such as a question, where it has one. Of a plain text it is
    the first three words, and of one of fewer than six words the first half of them, so that some
    of each text is left to refuse.

    Which refusal it is hangs on the contents of both alone, so neither the order of the texts nor
    that of the refusals matters.

    Args:
        text: what is to be forgotten.
        refusals: at least one.

    Returns:
        The twin; its beginning is its context.
    """
    beginning = _beginning(text)
    refusal = min(refusals, key=lambda one: _rank(text, one))
    return Text(f"{beginning} {refusal}" if beginning else refusal, len(beginning))


def _beginning(text: Text) -> str:
    context = text.text[: text.prompt_chars].rstrip()
    if context:
        return context
    words = min(BEGINNING_WORDS, len(text.text.split()) // 2)
    ends = [word.end() for word in islice(re.finditer(r"\S+", text.text), words)]
    return text.text[: ends[-1]] if ends else ""


def _rank(text: Text, refusal: str) -> bytes:
    content = f"{normalise(text.content)}\0{normalise(refusal)}"
    return blake2b(content.encode(), digest_size=16).digest()
