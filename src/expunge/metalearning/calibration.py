"""Calibration: which layer to read, found by short runs on validation (``layer: auto``).

The usual layer, 7 of 32, is that of 7-8B models, and wrong for others. Each candidate is trained
for a few steps with what a run without learning would use, and looked at on the validation split;
the one whose points have the largest hypervolume is taken. The test split is not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.defaults import SHALLOW, default_layer
from expunge.evaluation.pareto import hypervolume
from expunge.files import write_json
from expunge.learning import Learning
from expunge.metalearning.playing import Episodes
from expunge.recipe import Recipe
from expunge.training.watch import Point

CALIBRATION_NAME = "calibration.json"
# Depths that are tried, as shares of the layers; the published ones lie between .2 and .4.
DEPTHS = (0.22, 0.34, 0.5, 0.7, 1.0)
# Of a run's steps, what a short run has unless ``episode_steps`` is set: one in so many.
SHARE = 5


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        points: steps done -> forget and retain on validation.
        hypervolume: of these points, above the retain floor.
        worth: hypervolume above none; tells candidates apart that have nothing above the floor.
        seconds: of the short run.
    """

    layer: int
    points: dict[int, Point]
    hypervolume: float
    worth: float
    seconds: float

    @property
    def rank(self) -> tuple[float, float, int]:
        """Larger is better; of equals, the shallower costs less."""
        return self.hypervolume, self.worth, -self.layer


@dataclass(frozen=True)
class Calibration:
    """What was tried, and what was taken.

    Attributes:
        looked_at: what the looks measured.
    """

    layer: int
    looked_at: str
    tried: tuple[Tried, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`."""

        def tried(one: Mapping[str, Any]) -> Tried:
            points = {int(done): Point(*point) for done, point in one["points"].items()}
            return Tried(**{**one, "points": points})

        return cls(raw["layer"], raw["looked_at"], tuple(tried(one) for one in raw["tried"]))

    def save(self, path: Path, key: str) -> None:
        """Write it, with a fingerprint of what it rests on, atomically."""
        write_json(path, {"key": key, **self.to_dict()})

    @classmethod
    def load(cls, path: Path, key: str) -> Calibration | None:
        """What was written there for the same key; None if there is no such thing."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(raw) if raw["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is made again


def candidates(n_layers: int, trained: Sequence[int] = ()) -> tuple[int, ...]:
    """0-based layers to try, ascending; in a shallow model upper ones, and the last.

    Args:
        trained: layers that the recipe trains: none of them may lie above the one read.
    """
    depths = DEPTHS[2:] if n_layers <= SHALLOW else DEPTHS[:4]
    lowest = max(trained, default=0)
    found = {max(0, round(share * n_layers) - 1) for share in depths}
    return tuple(sorted(layer for layer in found if layer >= lowest)) or (lowest,)


def calibrate(learning: Learning, recipe: Recipe) -> Calibration:
    """Try the candidate layers; the seed is 0 whatever the recipe's, so that seeds agree.

    Each has a short run of its own, whose rate falls to zero within it: nothing but the layer is
    taken from it.

    Raises:
        DataError: there is nothing to look at on validation.
    """
    n_layers = learning.checkpoint.n_layers
    layers = candidates(n_layers, recipe.trained_layers or ())
    own = recipe.updated(seed=0, tradeoff="learned", policy_from=None, layer=layers[0])
    short = Episodes(learning, own).steps
    if own.episode_steps == "auto":
        short = max(own.steps // SHARE, short)
    every = math.ceil(short / 2) if own.action_every == "auto" else own.action_every
    own = own.updated(steps=short, episode_steps=short, action_every=every)
    tried: list[Tried] = []
    with learning.progress.phase("layers", len(layers)) as advance:
        for layer in layers:
            episodes = Episodes(learning, own.updated(layer=layer))
            episode, _ = episodes.play(episodes.actor(0), number=0)
            worth = hypervolume(episode.points.values(), floor=0.0)
            tried.append(Tried(layer, episode.points, episode.reward, worth, episode.seconds))
            advance(1, f"layer {layer}: hypervolume {episode.reward:.3f}")
            learning.drop_cuts()
    best = max(tried, key=lambda one: one.rank)
    layer = best.layer if best.worth > 0 else default_layer(n_layers)
    return Calibration(layer, Episodes(learning, own).kind, tuple(tried))
