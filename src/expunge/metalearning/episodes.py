"""What episodes did and saw, and their log, ``episodes.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from expunge.errors import RecipeError, TrainingError
from expunge.evaluation.looks import LookKind
from expunge.files import write_text
from expunge.training.policy import Trajectory
from expunge.training.watch import Point

EPISODES_NAME = "episodes.jsonl"
# By what rule episodes are played. A policy learns from no others.
RULE = "short episodes are the beginning of a run, below the floor a hundredth counts"

Ended = Literal["whole", "collapsed", "diverged"]
# What an episode is for: a whole run by the usual values; knobs drawn evenly, of which the best are
# where a policy begins; exploring around that policy; the run that follows; a trial of a search.
Role = Literal["usual", "drawn", "explored", "last", "trial"]


@dataclass(frozen=True)
class Episode:
    """What one episode did and saw.

    Attributes:
        number: 0-based; the last run has the number that follows the last episode's.
        role: what it is for.
        steps: inner steps done; fewer than planned where the rest collapsed.
        knobs: knob -> value, for each action.
        points: steps done -> forget and retain on validation.
        reward: hypervolume of the episode's own points above the floor.
        seconds: wall time.
        features, places, returns: what the policy learns from, for each action; empty of the last
            run; of the usual one ``returns`` alone, of what it gained in a short episode's steps.
        log_density: of the places under the policy that chose them; 0 without one.
        ended: ``whole``; ``collapsed``, stopped because the rest was lost; or ``diverged``, broken
            off because a number was not finite.
    """

    number: int
    role: Role
    steps: int
    knobs: tuple[dict[str, float], ...]
    points: dict[int, Point]
    reward: float
    seconds: float = 0.0
    features: tuple[tuple[float, ...], ...] = ()
    places: tuple[tuple[float, ...], ...] = ()
    returns: tuple[float, ...] = ()
    log_density: float = 0.0
    ended: Ended = "whole"

    @property
    def trajectory(self) -> Trajectory:
        """As the policy learns from it."""
        return Trajectory(
            np.array(self.features),
            np.array(self.places),
            np.array(self.returns),
            self.log_density,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"points": [[done, *point] for done, point in self.points.items()]}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Episode:
        """Inverse of `to_dict`."""
        points = {int(done): Point(forget, retain) for done, forget, retain in raw["points"]}
        if raw.get("role") not in get_args(Role):
            raise ValueError(f"an episode for {raw.get('role')!r}: by another version")
        lists = ("knobs", "features", "places", "returns")
        return cls(**raw | {"points": points} | {k: tuple(map(_frozen, raw[k])) for k in lists})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class EpisodeLog:
    """``episodes.jsonl``: what the episodes started from, then a line for each.

    Attributes:
        context: fingerprint of settings, data and base weights.
        looks, knobs: what they measured, and the knobs' ranges (`ranges_of`), for those who learn
            from these episodes.
    """

    path: Path
    context: str
    looks: LookKind
    knobs: Mapping[str, Any]

    def write(self, episodes: Sequence[Episode]) -> None:
        """The whole log anew, atomically."""
        facts = {"looks": self.looks, "knobs": dict(self.knobs)}
        header = {"rule": RULE, "context": self.context, **facts}
        lines = [header, *(one.to_dict() for one in episodes)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def read(self) -> list[Episode]:
        """The episodes played so far. Raises TrainingError if they started elsewhere."""
        if not self.path.exists():
            return []
        try:
            header, episodes = _read(self.path)
            context = str(header["context"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                what=f"The episodes of this run in {self.path.name} cannot be read",
                got=f"{type(error).__name__}: {error}",
                allowed="the file that an interrupted run left behind",
                fix="start again with --fresh",
            ) from error
        if context != self.context:
            raise TrainingError(
                what="The episodes here started from other data, another base or versions",
                got=f"episodes of {context[:12] or 'unknown origin'}",
                allowed=f"episodes of {self.context[:12]}",
                fix="put files and versions back as they were, or start again with --fresh",
            )
        return episodes


def lessons(folder: Path, looks: LookKind, knobs: Mapping[str, Any]) -> list[Episode]:
    """The episodes that taught a finished run's policy, in their order.

    Args:
        looks: what the looks measure that the policy is to act on.
        knobs: ranges of the knobs that it is to set (`ranges_of`).

    Raises:
        RecipeError: no run with a learned trade-off left any there, or its looks measured something
            else, for a policy acts on what it sees; or its knobs were others.
    """
    path = folder / EPISODES_NAME
    try:
        header, episodes = _read(path)
        if header.get("rule") != RULE:
            raise ValueError("episodes by another version, whose rule was another")
        found = [one for one in episodes if one.role not in ("last", "trial")]
        if all(one.role == "usual" for one in found):
            raise ValueError("no episode that a policy could learn from")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            what="There is no learned policy in the folder that policy_from names",
            got=f"{folder}: {type(error).__name__}: {error}",
            allowed="the folder of a finished run with --tradeoff learned",
            fix="check the path, or leave policy_from out",
        ) from error
    if header.get("looks") != looks:
        raise RecipeError(
            what="The policy that policy_from names learned from other looks than this run has",
            got=f"looks by {header.get('looks')}",
            allowed=f"looks by {looks}",
            fix="set reward as that run had it, or leave policy_from out",
        )
    if header.get("knobs") != dict(knobs):
        raise RecipeError(
            what="The policy that policy_from names sets other knobs than this run has",
            got=str(header.get("knobs")),
            allowed=str(dict(knobs)),
            fix="name a run of the same objective and version, or leave policy_from out",
        )
    return found


def _read(path: Path) -> tuple[dict[str, Any], list[Episode]]:
    """The first line, and the episodes of the others."""
    header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return dict(header), [Episode.from_dict(line) for line in lines]
