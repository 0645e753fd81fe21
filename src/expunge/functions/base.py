"""What a language function is to the rest of the package: data roles, a default objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from expunge.data.text import Labelled, Pair, Question, Text
from expunge.records import Split
from expunge.registry import Registry


@dataclass(frozen=True)
class DataSettings:
    """Where the data is and how it is divided; the data part of a recipe."""

    forget: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    pairs: str | None = None
    labelled: str | None = None
    prompts: str | None = None
    refusals: str | None = None
    questions: str | None = None
    retain_questions: str | None = None
    text: str | None = None
    field: str | None = None
    on_overlap: Literal["refuse", "drop"] = "refuse"
    validation_share: float = 0.2
    held_back_share: float = 0.1
    max_texts: int = 4000


@dataclass(frozen=True)
class Measured:
    """What is measured on one split."""

    forget_questions: tuple[Question, ...] = ()
    retain_questions: tuple[Question, ...] = ()
    forget_texts: tuple[Text, ...] = ()
    retain_texts: tuple[Text, ...] = ()
    perplexity_texts: tuple[Text, ...] = ()
    prompts: Mapping[str, tuple[Text, ...]] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class FunctionData:
    """All data of one run, in roles.

    Attributes:
        forget: training texts, a tuple for each topic.
        retain: training texts to keep.
        contrast: training texts of the other class, for probes; empty where ``retain`` is it.
        paired: whether ``contrast[i]`` is the other wording of ``forget[0][i]``.
        labelled: training texts of both classes, for scorers fitted on the run's own data.
        measured: validation (for choices) and test (touched once), disjoint.
        notes: what was left out and why, for the user.
        hashes: source -> SHA-256 of its content.
    """

    forget: tuple[tuple[Text, ...], ...]
    retain: tuple[Text, ...]
    measured: Mapping[Split, Measured]
    contrast: tuple[Text, ...] = ()
    paired: bool = False
    labelled: tuple[Labelled, ...] = ()
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def forgotten(self) -> tuple[Text, ...]:
        """Training texts of all topics; what can be looked at where no forget text is held back."""
        return tuple(text for topic in self.forget for text in topic)


Loader = Callable[[DataSettings], FunctionData]
FUNCTIONS: Registry[Loader] = Registry("function")


def function(
    name: str, *, source: str, deviations: str, objective: str
) -> Callable[[Loader], Loader]:
    """Register a language function: a loader of its data, and its default objective."""
    return FUNCTIONS.register(name, source=source, deviations=deviations, objective=objective)
