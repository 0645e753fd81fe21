"""A learned trade-off on the tiny world: settings that give a front of several points."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from small_world import World

from expunge.evaluation.looks import RepresentationLook
from expunge.training.watch import Point

EPISODES, STEPS, EVERY, SAVE_EVERY = 12, 12, 3, 4  # the policy is updated by the last two
# Texts of random words have no likelihood to lose; activations have an angle to turn.
SETTINGS = {
    "action_every": EVERY,
    "save_every": SAVE_EVERY,
    "reward": "representation",
    "retain_floor": 0.6,
    "look_every": 0,
}


def learned_args(world: World, out: Path, *more: Any, **changes: Any) -> list[str]:
    """A whole `expunge run` with a learned trade-off, in one process unless told otherwise."""
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    flags = {"tradeoff": "learned", "episodes": EPISODES, "steps": STEPS, "seed": 3, "workers": 1}
    return world.args(out, *settings, *more, **{**flags, **changes})


def learned_settings(world: World, **changes: Any) -> dict[str, Any]:
    """The same as a recipe's settings."""
    return {
        "model": str(world.model),
        "objective": "cosine-rmu",
        "forget": str(world.forget),
        "retain": str(world.retain),
        "layer": 2,
        "lr": 0.01,
        "batch_size": 4,
        "tradeoff": "learned",
        "episodes": EPISODES,
        "steps": STEPS,
        "seed": 3,
        **SETTINGS,
        **changes,
    }


def copied(run: Path, out: Path) -> Path:
    """A copy of a run, to be changed."""
    shutil.copytree(run, out)
    return out


def front_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "front.json").read_text())


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "record.json").read_text())


@contextmanager
def counted_looks() -> Iterator[list[Point]]:
    """What looks at validation see meanwhile, in this process."""
    seen: list[Point] = []
    look = RepresentationLook.__call__

    def counting(self: RepresentationLook) -> Point:
        seen.append(look(self))
        return seen[-1]

    RepresentationLook.__call__ = counting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        RepresentationLook.__call__ = look  # type: ignore[method-assign]


def chosen_of(out: Path) -> int:
    """Number of the chosen point, from 1."""
    (number,) = [place for place, entry in enumerate(front_of(out), 1) if entry["chosen"]]
    return number


def same_deltas(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def without_times(value: Any) -> Any:
    """A JSON value without the seconds in it."""
    if isinstance(value, dict):
        left_out = ("seconds", "timing", "peak_memory_bytes")
        return {k: without_times(v) for k, v in value.items() if k not in left_out}
    return [without_times(one) for one in value] if isinstance(value, list) else value
