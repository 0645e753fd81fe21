"""A run's folder: what lies in it, and whose it is.

Nothing of a user's is overwritten or discarded: a folder is used if it is new, empty, or that of
the same run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from expunge.edits import base as interventions
from expunge.edits import load_intervention
from expunge.errors import DataError, ExpungeError, PatchError
from expunge.files import disk_errors
from expunge.measuring import Artefact
from expunge.metalearning.archive import FRONT_FILE, FRONT_FOLDER, FRONT_LEFTOVER, FRONT_NAME
from expunge.metalearning.calibration import CALIBRATION_NAME
from expunge.metalearning.episodes import EPISODES_NAME
from expunge.model import patch as patches
from expunge.model.boundaries import SPILL_PREFIX
from expunge.model.patch import Patch
from expunge.model.shards import read_header
from expunge.probes import probe
from expunge.published import as_published
from expunge.recipe import MEASURING_FIELDS, Recipe
from expunge.records import RECORD_NAME, RunRecord

RECIPE_NAME = "recipe.yaml"
# Instead, where several recipes are behind one patch; beside it, runs that belong to it.
RECIPES_NAME = "recipes.yaml"
BEFORE_FOLDER = "before"
MEASURED_PREFIX = "measured-"
PATCH_NAME = "patch.safetensors"
LOSSES_NAME = "losses.jsonl"
STATE_NAME = "state.safetensors"
INTERVENTION_NAME = "intervention.safetensors"
PROBES_NAME = "probes.safetensors"
WORK_NAMES = (
    PATCH_NAME,
    INTERVENTION_NAME,
    PROBES_NAME,
    LOSSES_NAME,
    STATE_NAME,
    CALIBRATION_NAME,
    EPISODES_NAME,
    FRONT_NAME,
    FRONT_FOLDER,
    RECORD_NAME,
)
# What a killed process leaves in its folder, with its number: spilled boundaries, half a file.
_LEFTOVER = re.compile(
    rf"{re.escape(SPILL_PREFIX)}(\d+)-\w+"
    rf"|\.(?:{'|'.join(map(re.escape, (RECIPE_NAME, RECIPES_NAME, *WORK_NAMES)))})\.(\d+)\.tmp"
)


Kind = Literal["patch", "intervention", "probes"]


def kind_of(path: Path) -> Kind | None:
    """What a file is, by its header; None for anything that expunge did not write."""
    try:
        _, header = read_header(path)
    except (OSError, ValueError):
        return None
    kinds: dict[str, Kind] = {
        patches.FORMAT: "patch",
        interventions.FORMAT: "intervention",
        probe.FORMAT: "probes",
    }
    return kinds.get(header.get("format", ""))


def load_artefact_file(path: Path) -> Artefact:
    """A patch or an intervention. Raises PatchError for anything else."""
    return load_intervention(path) if kind_of(path) == "intervention" else Patch.load(path)


def load_artefact(out: Path) -> Artefact | None:
    """The patch or the intervention in a run directory; None if there is neither."""
    if holds(out, PATCH_NAME):
        return Patch.load(out / PATCH_NAME)
    return load_intervention(out / INTERVENTION_NAME) if holds(out, INTERVENTION_NAME) else None


def check_own(out: Path) -> None:
    """Refuse a folder that is not a run's: what a run writes and discards there may be a user's."""
    if out.exists() and not out.is_dir():
        raise DataError(
            what="The output folder is a file",
            got=str(out),
            allowed="a new or empty folder",
            fix="choose another -o",
        )
    names = {path.name for path in out.glob("[!.]*")}
    ours = names & {RECIPE_NAME, RECIPES_NAME, *WORK_NAMES}
    if RECIPES_NAME in ours:
        ours |= {name for name in names if _belongs(out / name)}
    if FRONT_FOLDER in ours and not _is_front(out / FRONT_FOLDER):
        ours.remove(FRONT_FOLDER)
    others = sorted(names - ours)
    # A recipe without any work may be one that a user wrote.
    if others and not (ours & {RECIPE_NAME, RECIPES_NAME} and len(ours) > 1):
        raise DataError(
            what="The output folder holds files that are no run's",
            got=f"{out} with {', '.join(others[:5])}{', …' if len(others) > 5 else ''}",
            allowed="a new folder, an empty one, or that of an earlier run",
            fix="choose another -o, such as a new folder within this one",
        )


def look(recipe: Recipe, out: Path) -> RunRecord | None:
    """Refuse a folder of another run; the record if it holds this very run, finished."""
    work = [name for name in WORK_NAMES if holds(out, name)]
    # A recipe alone is a run that never took a step: nothing is lost with it.
    if not work:
        return None
    if holds(out, RECIPE_NAME):
        earlier = Recipe.load(out / RECIPE_NAME)
        if earlier.fingerprint != recipe.fingerprint:
            raise DataError(
                what="The output folder holds a run with other settings",
                got=f"{out}, which differs in {', '.join(_differences(earlier, recipe))}",
                allowed="a new folder, or the same settings to go on with an interrupted run",
                fix="choose another -o, or discard that run with --fresh",
            )
        keys = ("evaluate", "measure_on", "measure_probes", "oracle", *MEASURING_FIELDS)
        measured = all(getattr(earlier, key) == getattr(recipe, key) for key in keys)
        if RECORD_NAME in work and (measured or not recipe.evaluate):
            return RunRecord.load(out)
        return None
    raise DataError(
        what="The output folder holds a run without its recipe",
        got=f"{out} with {', '.join(work)}",
        allowed="a new or empty folder",
        fix="choose another -o, or discard what is there with --fresh",
    )


def claim(recipe: Recipe, out: Path, *, fresh: bool) -> None:
    """Make ``out`` the folder of this recipe."""
    make_way(out, fresh=fresh)
    (out / RECIPES_NAME).unlink(missing_ok=True)
    recipe.save(out / RECIPE_NAME)


def make_way(out: Path, *, fresh: bool) -> None:
    """Clear away leftovers and a record that is to be replaced; ``fresh``: all earlier work."""
    clear_leftovers(out)
    with disk_errors(out):
        # A record that is here is of the run to be discarded, or lacks what is to be measured.
        # It goes first: without it, a run is not finished.
        (out / RECORD_NAME).unlink(missing_ok=True)
        if fresh:
            for name in {*WORK_NAMES} - {FRONT_FOLDER}:
                (out / name).unlink(missing_ok=True)
            _clear_front(out / FRONT_FOLDER)


def clear_leftovers(out: Path) -> None:
    """Remove what dead processes left in a run's folder."""
    for folder, leftover in ((out, _LEFTOVER), (out / FRONT_FOLDER, FRONT_LEFTOVER)):
        with disk_errors(folder):
            for path in folder.glob(".*"):
                match = leftover.fullmatch(path.name)
                if match and not psutil.pid_exists(int(next(filter(None, match.groups())))):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _clear_front(folder: Path) -> None:
    """Remove the patches of a front, and the folder if nothing else is in it."""
    for path in folder.glob("*"):
        if FRONT_FILE.fullmatch(path.name):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _belongs(path: Path) -> bool:
    """Whether a folder of that name holds a run that belongs to the one around it."""
    name = path.name
    return path.is_dir() and (name == BEFORE_FOLDER or name.startswith(MEASURED_PREFIX))


def _is_front(folder: Path) -> bool:
    """Whether a folder of that name holds patches of a front alone, or nothing."""
    if not folder.is_dir():
        return False
    return all(FRONT_FILE.fullmatch(path.name) for path in folder.glob("[!.]*"))


@contextmanager
def unclaiming(out: Path) -> Iterator[None]:
    """On an error before the first step, leave no folder behind that holds a recipe alone."""
    try:
        yield
    except ExpungeError:
        left = [path.name for path in out.iterdir()]
        if left in ([RECIPE_NAME], [RECIPES_NAME]):
            (out / left[0]).unlink()
            out.rmdir()
        raise


def holds(out: Path, name: str) -> bool:
    return (out / name).exists()


def check_trained_here(patch: Artefact, out: Path) -> None:
    """A patch that was put here by hand, or is a sum of patches, tells of no training."""
    training = patch.metadata.get("training")
    facts = training if isinstance(training, dict) else {}
    if not all(isinstance(facts.get(name), dict) for name in ("data", "timing")):
        raise PatchError(
            what=f"The patch in {out} was not left there by a run",
            got=f"{PATCH_NAME} without the data and times of its training",
            allowed="the patch that the interrupted run of this folder saved",
            fix="take that file elsewhere, then start again with --fresh; "
            "`expunge eval --patch` measures any patch",
        )


def check_same_data(patch: Artefact, hashes: Mapping[str, str], out: Path) -> None:
    """The record names the data's hashes; they must be those that the patch was trained on."""
    trained_on = patch.metadata["training"]["data"]
    now = as_published(hashes)
    # Told as typed; a patch knows the published names alone.
    typed = dict(zip(now, hashes, strict=True))
    changed = sorted(typed.get(k, k) for k in trained_on if trained_on[k] != now.get(k))
    if changed:
        raise DataError(
            what=f"The data has changed since the patch in {out} was trained",
            got=f"{', '.join(changed)} with other content",
            allowed="the files as they were when the run began",
            fix="put the files back as they were, or start again with --fresh",
        )


def _differences(one: Recipe, other: Recipe) -> list[str]:
    a, b = one.model_dump(), other.model_dump()
    return [key for key in a if a[key] != b[key]]
