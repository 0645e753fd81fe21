"""The miniature: a generated world, a small model that knows it, and its retrained oracle.

The oracle has the base's shape, tokenizer and recipe, and never read about the substances nor a
rude scene: what unlearning aims at. The world is the same on every machine, so the checkpoints
in the package belong to the data that `World.generate` makes.
"""

import json
from pathlib import Path

from expunge.errors import DataError
from expunge.miniature.lexicon import RUDE_WORDS
from expunge.miniature.scenes import ScenePair
from expunge.miniature.world import Fact, Question, World, answered, prompt

__all__ = [
    "RUDE_WORDS",
    "Fact",
    "Question",
    "ScenePair",
    "World",
    "answered",
    "base_directory",
    "check_data",
    "manifest",
    "oracle_directory",
    "prompt",
]

ASSETS = Path(__file__).parent / "assets"
_REBUILD = "python -m expunge.miniature.build --out DIR"


def base_directory() -> Path:
    """Return the model directory of the base, which knows the whole world (float16 on disk)."""
    return _model_directory("base", _REBUILD)


def oracle_directory() -> Path:
    """Return the model directory of the oracle, which never met the hazard nor rudeness."""
    return _model_directory("oracle", f"{_REBUILD} --oracle")


def manifest() -> dict[str, object]:
    """Return what the build recorded: seed, data hash, and each model's steps and measurements.

    Raises:
        DataError: the package came without its assets.
    """
    path = ASSETS / "manifest.json"
    if not path.is_file():
        raise _missing(path.name, _REBUILD)
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_data() -> World:
    """Return the shipped checkpoints' world, after comparing its hash with the manifest's.

    Raises:
        DataError: the generated world is not the one that the checkpoints were trained on.
    """
    recorded = manifest()
    world = World.generate(int(str(recorded["seed"])))
    if world.data_hash() != recorded["data_sha256"]:
        raise DataError(
            what="The generated miniature world differs from the checkpoints' training data",
            got=f"sha256 {world.data_hash()}",
            allowed=f"sha256 {recorded['data_sha256']}, as in the manifest",
            fix=f"install expunge again, or train both models anew: {_REBUILD} [--oracle]",
        )
    return world


def _model_directory(name: str, command: str) -> Path:
    path = ASSETS / name
    if not (path / "model.safetensors").is_file():
        raise _missing(f"{name}/model.safetensors", command)
    return path


def _missing(name: str, command: str) -> DataError:
    return DataError(
        what="The miniature's checkpoint is missing",
        got=f"no {name} among the package's assets",
        allowed="a package installed with its assets",
        fix=f"install expunge again, or train the miniature: {command}",
    )
