"""What a run leaves behind to be read later: scores and the run record.

Frozen value objects with a JSON form. A missing value is ``None`` with a reason, never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
        _check(raw, _RECORD)
        for name in _LISTS:
            for one in raw.get(name, []):
                _check(one, _LISTS[name], f"{name}: ")
        _check_facts(raw)
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


def ended_of(tried: Sequence[Mapping[str, Any]], episode: int) -> str | None:
    """How an episode of a trade-off ended: ``whole``, ``collapsed`` or ``diverged``.

    None where the record does not tell, as earlier ones.

    Args:
        tried: of each episode and the last run, in this order, what a record tells.
    """
    return tried[episode].get("ended") if episode < len(tried) else None


# Of which kind a record's fields are, as far as results are computed from them. All others are
# free: who reads them looks first.
_NUMBER, _TEXT = (int, float), (str,)
_OR_NONE = (type(None),)
_OBJECT, _LIST = (dict, *_OR_NONE), (list, *_OR_NONE)
_Kinds = Mapping[str, tuple[type, ...]]
_RECORD: _Kinds = {
    **dict.fromkeys(("function", "objective"), _TEXT),
    **dict.fromkeys(("timing", "provenance", "training", "asked"), (dict,)),
    **dict.fromkeys(("scores", "values", "samples"), (list,)),
    "seed": (int,),
    "peak_memory_bytes": _NUMBER,
}
_MEASURED: _Kinds = {
    **dict.fromkeys(("name", "model", "split", "unit", "higher_is"), _TEXT),
    **dict.fromkeys(("scorer", "prompts", "reason"), (*_TEXT, *_OR_NONE)),
}
_LISTS: Mapping[str, _Kinds] = {
    "scores": {
        **_MEASURED,
        **dict.fromkeys(("value", "ci_low", "ci_high", "chance"), (*_NUMBER, *_OR_NONE)),
        "n": (int,),
    },
    "values": {**_MEASURED, "values": (list,), "weights": _LIST},
    "samples": {"prompts": _TEXT, "prompt": _TEXT, "said": (dict,), "flagged": (dict,)},
}
_TRAINING: _Kinds = {
    **dict.fromkeys(("tradeoff", "last", "split_reads", "calibration"), _OBJECT),
    # Early records have the names alone.
    **dict.fromkeys(("parts", "control_of"), (dict, list)),
    "looks": (*_NUMBER, *_OR_NONE),
    "diverged": _TEXT,
}
_TRADEOFF: _Kinds = {"inner_steps": (*_NUMBER, *_OR_NONE), "chosen": _OBJECT, "tried": _LIST}
_PROVENANCE: _Kinds = dict.fromkeys(("recipe", "data", "base", "scorer_files"), _OBJECT)
_RECIPE: _Kinds = {"retain_floor": _NUMBER, "scorers": (list,)}


def _check(raw: Any, kinds: _Kinds, where: str = "") -> None:
    """Raise TypeError unless ``raw`` is an object whose fields, where it has them, are of a kind.

    A number is finite and fits 64 bits.
    """
    if not isinstance(raw, dict):
        raise TypeError(f"{where}{_shown(raw)} is no object")
    for name, kind in kinds.items():
        if name in raw and not _is(raw[name], kind):
            raise TypeError(f"{where}{name} is {_shown(raw[name])}")


def _check_all(values: Any, kind: tuple[type, ...], where: str) -> None:
    for value in values or ():
        if not _is(value, kind):
            raise TypeError(f"{where} holds {_shown(value)}")


def _check_facts(raw: Mapping[str, Any]) -> None:
    """What lies deeper than a field, as far as results are computed from it."""
    for score in raw["scores"]:
        value = score.get("value")
        if score.get("unit") == "perplexity" and value is not None and value <= 0:
            raise TypeError(f"scores: a perplexity of {value}")
    for one in raw.get("values", []):
        numbers, weights = one["values"], one.get("weights")
        _check_all(numbers, (*_NUMBER, *_OR_NONE), "values")
        _check_all(weights, _NUMBER, "weights")
        if weights is not None and len(weights) != len(numbers):
            raise TypeError(f"values: {len(numbers)} values with {len(weights)} weights")
    for sample in raw.get("samples", []):
        _check_all(sample["flagged"].values(), _LIST, "flagged")
    _check_all(raw.get("asked", {}).values(), (list,), "asked")
    _check_all(raw["timing"].values(), _NUMBER, "timing")
    training, provenance = raw.get("training", {}), raw["provenance"]
    _check(training, _TRAINING, "training: ")
    tradeoff = training.get("tradeoff") or {}
    _check(tradeoff, _TRADEOFF, "training: tradeoff: ")
    _check_all(tradeoff.get("tried"), (dict,), "training: tradeoff: tried")
    _check(training.get("last") or {}, {"step": (int,)}, "training: last: ")
    _check_all((training.get("split_reads") or {}).values(), (int,), "training: split_reads")
    _check(provenance, _PROVENANCE, "provenance: ")
    for tensor in (provenance.get("base") or {}).values():
        _check(tensor, {}, "provenance: base: ")
        _ = tensor["fingerprint"]
    _check_all((provenance.get("scorer_files") or {}).values(), _TEXT, "provenance: scorer_files")
    recipe = provenance.get("recipe") or {}
    _check(recipe, _RECIPE, "provenance: recipe: ")
    if recipe.get("retain_floor", 0) >= 1:
        raise TypeError(f"provenance: recipe: retain_floor is {recipe['retain_floor']}")


def _is(value: Any, kind: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
