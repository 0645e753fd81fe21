"""Scorers: how toxic is a text? A report needs two or more, for each sees another side.

words, words:FILE      a word list, learned from the run's own texts or given
tfidf, tfidf:FILE      TF-IDF + logistic regression, fitted on the run's own or other texts
hf:DIR[#label=NAME]    any Hugging Face text classifier, by directory or hub name
detoxify               Detoxify (an extra)
perspective            the Perspective API: texts leave this machine
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from expunge.data.text import Labelled
from expunge.errors import RecipeError
from expunge.evaluation.scorers.base import THRESHOLD, Remembered, Scorer
from expunge.evaluation.scorers.classifier import Classifier
from expunge.evaluation.scorers.detoxify import DetoxifyScorer
from expunge.evaluation.scorers.perspective import Perspective
from expunge.evaluation.scorers.tfidf import TfidfScorer
from expunge.evaluation.scorers.words import WordList
from expunge.registry import nearest

__all__ = [
    "THRESHOLD",
    "Classifier",
    "DetoxifyScorer",
    "Perspective",
    "Remembered",
    "Scorer",
    "TfidfScorer",
    "WordList",
    "build_scorers",
]

KINDS = ("words", "tfidf", "hf", "detoxify", "perspective")
ALONE = ("detoxify", "perspective")  # take nothing after a colon
FORMS = "words, words:FILE, tfidf, tfidf:FILE, hf:DIR[#label=NAME], detoxify, perspective"


def build_scorers(
    specs: Sequence[str], own: Sequence[Labelled], *, device: str = "cpu"
) -> tuple[Scorer, ...]:
    """The scorers of one report, in the order named, each with a name of its own.

    Args:
        specs: as in the module's table; at least two, all different.
        own: the run's own labelled training texts, for ``words`` and ``tfidf`` without a file.
        device: for classifiers.

    Raises:
        RecipeError: fewer than two, one named twice, an unknown one, a key or package missing.
        DataError: a file is missing or lacks a class, or a classifier's labels cannot be mapped.
        ModelError: a classifier cannot be opened.
    """
    parsed = [_parse(spec) for spec in specs]
    if len(set(parsed)) < len(parsed) or len(parsed) < 2:
        raise RecipeError(
            what="A report needs two scorers or more, all different: one alone misses too much",
            got=", ".join(specs) or "none",
            allowed=f"two or more of {FORMS}",
            fix="name a second one, such as words beside tfidf:FILE",
        )
    names = _distinct([_name(kind, rest) for kind, rest in parsed])
    return tuple(
        _build(kind, rest, name, own, device)
        for (kind, rest), name in zip(parsed, names, strict=True)
    )


def _parse(spec: str) -> tuple[str, str]:
    """``tfidf:FILE`` -> ("tfidf", "FILE")."""
    kind, colon, rest = spec.partition(":")
    if kind not in KINDS:
        raise RecipeError(
            what="Unknown scorer",
            got=repr(spec),
            allowed=FORMS,
            fix=nearest(kind, KINDS),
        )
    if (colon and not rest) or (kind in ALONE and rest) or (kind == "hf" and not rest):
        raise RecipeError(
            what=f"The scorer {kind} is not named as it should be",
            got=repr(spec),
            allowed=", ".join(form for form in FORMS.split(", ") if form.startswith(kind)),
            fix="write it in one of these forms",
        )
    return kind, rest


def _build(kind: str, rest: str, name: str, own: Sequence[Labelled], device: str) -> Scorer:
    if kind == "hf":
        source, _, label = rest.partition("#label=")
        return Classifier.load(source, label=label or None, name=name, device=device)
    if kind == "words":
        return (
            WordList.from_file(rest, name=name) if rest else WordList.from_labelled(own, name=name)
        )
    if kind == "tfidf":
        if not rest:
            return TfidfScorer.fit(own, name=name)
        from expunge.data.sources import read_labelled

        return TfidfScorer.fit(read_labelled(rest).items, name=name, source=Path(rest).name)
    builders: dict[str, Callable[[], Scorer]] = {
        "detoxify": lambda: DetoxifyScorer.load(name=name, device=device),
        "perspective": lambda: Perspective(name=name),
    }
    return builders[kind]()


def _name(kind: str, rest: str) -> str:
    """The kind, with the file's or the model's own name where there is one."""
    short = Path(rest.partition("#label=")[0]).name
    return f"{kind}:{short}" if rest else kind


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those met before with -2, -3, … behind."""
    distinct: list[str] = []
    for name in names:
        number, unlike = 1, name
        while unlike in distinct:
            number += 1
            unlike = f"{name}-{number}"
        distinct.append(unlike)
    return distinct
