"""Names and settings as they may be shown: patches and records are given away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.files import local_path
from expunge.recipe import Recipe

SOURCE_FIELDS = (
    "forget retain pairs labelled prompts refusals questions retain_questions text".split()
)


def published(name: str) -> str:
    """A source or model as it may be shown: of a local path the last part alone.

    Where things lay on a machine is nobody's business.
    """
    path = local_path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name


def as_published(hashes: Mapping[str, str]) -> dict[str, str]:
    """The data's hashes by published names; a name that comes again gets a number."""
    found: dict[str, str] = {}
    for name, digest in hashes.items():
        shown = published(name)
        again = sum(key == shown or key.startswith(f"{shown}#") for key in found)
        found[f"{shown}#{again + 1}" if again else shown] = digest
    return found


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings, JSON-able, with published names."""
    settings = recipe.model_dump(mode="json", exclude_none=True)
    for key in ("model", "oracle", "policy_from", *SOURCE_FIELDS):
        value = settings.get(key)
        if isinstance(value, str):
            settings[key] = published(value)
        elif value is not None:
            settings[key] = [published(name) for name in value]
    settings["scorers"] = [_published_scorer(spec) for spec in settings["scorers"]]
    return settings


def _published_scorer(spec: str) -> str:
    kind, colon, source = spec.partition(":")
    path, hash_, option = source.partition("#")
    return f"{kind}{colon}{published(path) if path else path}{hash_}{option}"
