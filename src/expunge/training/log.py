"""The log of a run, ``losses.jsonl``: the one file that grows in place, a line for each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expunge.files import disk_errors, write_text


@dataclass(frozen=True)
class StepLog:
    """One line of ``losses.jsonl``. ``loss`` is the weighed sum; seconds are of this step alone.

    Attributes:
        knobs: what a learned trade-off set at this step.
        point: forget and retain on validation after this step, where a look was taken.
    """

    step: int
    topic: int
    loss: float
    forget: float
    retain: float
    gradient_norm: float
    seconds: float
    logs: dict[str, float]
    knobs: dict[str, float] = field(default_factory=dict)
    point: tuple[float, float] | None = None


def read_losses(path: Path) -> list[StepLog]:
    """The lines of a ``losses.jsonl``; a half-written last line is left out."""
    if not path.exists():
        return []
    log = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            raw = json.loads(line)
            if raw.get("point") is not None:
                raw["point"] = tuple(raw["point"])
            log.append(StepLog(**raw))
        except (json.JSONDecodeError, TypeError, AttributeError):
            break
    return log


def ends_of(log: Sequence[StepLog]) -> dict[str, Any]:
    """What a record tells of a log beside its curve: how it began and ended."""
    return {
        "first_loss": log[0].loss if log else None,
        "last_loss": log[-1].loss if log else None,
        "last": asdict(log[-1]) if log else None,
    }


def curve(log: Sequence[StepLog], most: int = 100) -> dict[str, Any]:
    """What is worth drawing of a run, a list for each quantity: at most ``most`` steps, evenly.

    ``points`` holds all looks: steps done, forget, retain.
    """
    n = min(most, len(log))
    taken = sorted({len(log) - 1 - at * len(log) // n for at in range(n)})
    some = [log[at] for at in taken]
    names = ("step", "loss", "forget", "retain", "gradient_norm")
    drawn: dict[str, Any] = {name: [_short(getattr(e, name)) for e in some] for name in names}
    for group in ("logs", "knobs"):
        keys = dict.fromkeys(key for entry in some for key in getattr(entry, group))
        drawn[group] = {
            key: [_short(getattr(entry, group).get(key)) for entry in some] for key in keys
        }
    drawn["points"] = [[e.step + 1, *map(_short, e.point)] for e in log if e.point is not None]
    return drawn


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _line(entry: StepLog) -> str:
    return json.dumps(asdict(entry)) + "\n"


def append_step(path: Path | None, entry: StepLog) -> None:
    """Add the line of a step; without a path, nothing."""
    # No temporary name: a torn last line is recognised when it is read.
    if path is not None:
        with disk_errors(path), path.open("a", encoding="utf-8") as handle:
            handle.write(_line(entry))


def write_losses(path: Path, log: Sequence[StepLog]) -> None:
    """Write the whole log anew, atomically."""
    write_text(path, "".join(_line(entry) for entry in log))
