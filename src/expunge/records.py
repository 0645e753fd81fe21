"""What a run leaves behind to be read later: scores and the run record.

Frozen value objects with a JSON form. A missing value is ``None`` with a reason, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from expunge.errors import DataError
from expunge.files import write_json

SCHEMA_VERSION = 2
# Version 1 lacks what later ones add beside the scores; it reads as nothing there.
READABLE = (1, SCHEMA_VERSION)
RECORD_NAME = "record.json"

ModelRole = Literal["base", "patched", "oracle"]
Split = Literal["train", "validation", "test", "all"]


def full_name(name: str, scorer: str | None, prompts: str | None) -> str:
    """``toxicity_rate/openings/tfidf``; the name alone where nothing else tells scores apart."""
    return "/".join(part for part in (name, prompts, scorer) if part)


@dataclass(frozen=True)
class Score:
    """One number with its uncertainty.

    Attributes:
        name: ``forget_accuracy``, ``retain_accuracy``, ``forget_nll``, ``retain_nll``,
            ``perplexity``, …
        model: which model was measured: base, patched or oracle.
        split: the split of the data it was measured on.
        value: the number, in ``unit``; None if unscored.
        ci_low, ci_high: 95 % interval over examples; None if unscored.
        n: examples behind the number.
        higher_is: whether a higher value is ``better`` or ``worse`` for the purpose of the run.
        unit: ``fraction``, ``nats/token`` or ``perplexity``.
        chance: what guessing reaches, where that is known.
        reason: why there is no value.
        scorer: what judged the texts, for scores that rest on a judgement.
        prompts: the set of prompts that was continued, for scores of continuations.
    """

    name: str
    model: ModelRole
    split: Split
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    higher_is: Literal["better", "worse"]
    unit: str = "fraction"
    chance: float | None = None
    reason: str | None = None
    scorer: str | None = None
    prompts: str | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What is measured: scores with one key compare between models."""
        return self.name, self.scorer, self.prompts


@dataclass(frozen=True)
class Values:
    """What lies behind a `Score`, example by example, so that runs can be compared in pairs.

    Runs on the same data measure the same examples in the same order.

    Attributes:
        name, model, split, unit, scorer, prompts: as of the score; values of a perplexity are in
            nats/token.
        values: one an example, rounded to 6 digits; None: not scored.
        weights: of the examples in a mean, such as tokens; None: they count alike.
    """

    name: str
    model: ModelRole
    split: Split
    values: list[float | None]
    weights: list[float] | None = None
    unit: str = "fraction"
    scorer: str | None = None
    prompts: str | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """That of the score."""
        return self.name, self.scorer, self.prompts


@dataclass(frozen=True)
class Sample:
    """How models go on from one prompt: the first continuation of each. Untrusted text.

    Attributes:
        prompts: the set of prompts.
        prompt: the text that was continued.
        said: model -> continuation.
        flagged: model -> the scorers that call its continuation toxic.
    """

    prompts: str
    prompt: str
    said: dict[str, str]
    flagged: dict[str, list[str]]


@dataclass(frozen=True)
class RunRecord:
    """Everything about one run that a reader needs to trust and to repeat it.

    Attributes:
        timing: seconds spent in ``load``, ``prefix``, ``train``, ``evaluate``.
        peak_memory_bytes: largest resident memory of the process during the run.
        provenance: recipe, model and data hashes, package versions, hardware, commit.
        values: what lies behind the scores, example by example.
        asked: the first questions of the ``forget`` and the ``retain`` side that was measured, in
            the order of the values of ``forget_accuracy`` and ``retain_accuracy``.
        samples: what the models said.
    """

    function: str
    objective: str
    seed: int
    timing: dict[str, float]
    peak_memory_bytes: int
    provenance: dict[str, Any]
    scores: list[Score] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    values: list[Values] = field(default_factory=list)
    asked: dict[str, list[str]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RunRecord:
        """Inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        for name in ("timing", "provenance", "training", "asked"):
            if not isinstance(raw.get(name, {}), dict):
                raise TypeError(f"{name} is no object")
        read = {
            "scores": [Score(**score) for score in raw["scores"]],
            "values": [Values(**one) for one in raw.get("values", [])],
            "samples": [Sample(**one) for one in raw.get("samples", [])],
        }
        return cls(**{**raw, **read})

    def save(self, directory: Path) -> Path:
        """Write ``record.json`` under ``directory``, atomically."""
        path = directory / RECORD_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, directory: Path) -> RunRecord:
        """Read ``record.json`` of a run directory. Raises DataError if it is not a record."""
        path = directory / RECORD_NAME if directory.is_dir() else directory
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["schema_version"] not in READABLE:
                raise DataError(
                    what=f"{path} was written by another version of expunge",
                    got=f"schema_version {raw['schema_version']}",
                    allowed=f"schema_version {' or '.join(map(str, READABLE))}",
                    fix="run again, or install the version named in its provenance",
                )
            return cls.from_dict(raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                what=f"No readable run record at {path}",
                got=f"{type(error).__name__}: {error}",
                allowed="a run directory with record.json, as `expunge run -o DIR` leaves it",
                fix="give the path of a finished run; `expunge ls DIR` lists them",
            ) from error

    def score(
        self,
        name: str,
        model: str = "patched",
        split: str | None = None,
        *,
        scorer: str | None = None,
        prompts: str | None = None,
    ) -> Score | None:
        """The first score of that name and model (and split, scorer, prompts), or None."""
        for score in self.scores:
            if (
                (score.name, score.model) == (name, model)
                and split in (None, score.split)
                and scorer in (None, score.scorer)
                and prompts in (None, score.prompts)
            ):
                return score
        return None


def find_records(
    directory: Path, on_unreadable: Callable[[DataError], None]
) -> list[tuple[Path, RunRecord]]:
    """Finished runs in a folder or anywhere below it, by path.

    Args:
        on_unreadable: called with the error for a record that is left out.

    Raises:
        DataError: the folder is missing.
    """
    if not directory.is_dir():
        raise DataError(
            what="There is no such folder",
            got=str(directory),
            allowed="a folder that holds runs",
            fix="check the path",
        )
    paths = sorted(path.parent for path in directory.rglob(RECORD_NAME))
    found = []
    for path in paths:
        try:
            found.append((path, RunRecord.load(path)))
        except DataError as error:
            on_unreadable(error)
    return found
