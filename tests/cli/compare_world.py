"""A comparison on the tiny world: two functions, an objective each, and a control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from small_world import World

OWN = {"knowledge": "cosine-rmu", "toxicity": "npo"}
EDIT, CONTROL = "profs", "random-control"
STEPS, SEEDS, TRIALS = 4, 2, 2


def tiny_settings(world: World, **changes: Any) -> dict[str, Any]:
    """A plan file's content. Texts have likelihoods, so looks need no base that knows answers."""
    common = {
        "model": str(world.model),
        "retain": [str(world.retain)],
        "lr": 0.01,
        "reward": "likelihood",
        "action_every": 2,
        "look_items": 4,
        "look_every": 0,
        "retain_floor": 0.1,
        "collapse_floor": 0.01,
        "front_size": 2,
        "steps": STEPS,
        "calibrate": False,
    }
    short = {"samples": 2, "new_tokens": 5, "max_prompts": 4, "batch_size": 24}
    return {
        "functions": {
            "knowledge": {**common, "forget": [str(world.forget)], "batch_size": 4},
            "toxicity": {
                **common,
                **short,
                "pairs": str(world.pairs),
                "prompts": str(world.prompts),
                "scorers": [f"words:{world.words}", "tfidf"],
            },
        },
        "methods": [*OWN.values(), EDIT, CONTROL],
        "own": OWN,
        "settings": {EDIT: {"knowledge": {"refusals": str(world.fluent)}}},
        "seeds": SEEDS,
        "trials": TRIALS,
        "interference_seeds": 1,
        **changes,
    }


def write_plan(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())
