"""The composition root: a recipe becomes a patch and a run record."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from expunge.edits import load_intervention
from expunge.errors import DataError, ExpungeError, PatchError, RecipeError
from expunge.files import disk_errors
from expunge.learning import method_of
from expunge.measuring import Artefact
from expunge.model.boundaries import SPILL_PREFIX
from expunge.model.memory import peak_bytes
from expunge.model.patch import Patch
from expunge.probes.probe import save_probes
from expunge.progress import Progress, Silent, timed
from expunge.published import as_published, published
from expunge.recipe import MEASURING_FIELDS, Recipe
from expunge.records import RECORD_NAME, RunRecord, Score
from expunge.training.loop import Stage
from expunge.workbench import Workbench

RECIPE_NAME = "recipe.yaml"
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
    RECORD_NAME,
)
# What a killed process leaves in its folder, with its number: spilled boundaries, half a file.
_LEFTOVER = re.compile(
    rf"{re.escape(SPILL_PREFIX)}(\d+)-\w+"
    rf"|\.(?:{'|'.join(map(re.escape, (RECIPE_NAME, *WORK_NAMES)))})\.(\d+)\.tmp"
)


def unlearn(
    model: str | Path,
    *,
    forget: str | Path | Sequence[str | Path] = (),
    retain: str | Path | Sequence[str | Path],
    progress: Progress | None = None,
    **settings: Any,
) -> Patch:
    """Remove a language function; nothing is written and nothing but the patch is kept.

    Args:
        model: model directory, or hub name.
        forget: text source or sources to forget; each is a topic with a direction of its own.
            Toxicity takes ``pairs`` or ``labelled`` instead.
        retain: text source or sources to keep.
        progress: told what is going on; default: silent.
        settings: any other field of `expunge.recipe.Recipe`.

    Returns:
        The patch; ``patch.apply_(model)``, ``patch.save(path)``.

    Raises:
        ExpungeError: one of its kinds; see `expunge.errors`.
    """
    recipe = Recipe.build(
        {
            "model": str(model),
            "forget": _names(forget),
            "retain": _names(retain),
            **settings,
        }
    )
    bench = Workbench(recipe, progress or Silent())
    bench.check(recipe)
    patch, _ = bench.train(recipe)
    if not isinstance(patch, Patch):
        raise RecipeError(
            what=f"{recipe.objective} changes no weights, so there is no patch",
            got=f"objective {recipe.objective}",
            allowed="objectives, and edits that change weights",
            fix="use `expunge.run.run`, which keeps an intervention as well",
        )
    return patch


def run(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress | None = None,
    bench: Workbench | None = None,
    fresh: bool = False,
) -> RunRecord:
    """Train, save and measure; or go on where an interrupted run of the same recipe stopped.

    Leaves ``recipe.yaml``, ``patch.safetensors``, ``record.json`` and ``losses.jsonl`` in ``out``.

    Args:
        recipe: the run's settings.
        out: its folder; one run each.
        progress: told what is going on; default: silent.
        bench: shared with other runs of the same model and data.
        fresh: discard what ``out`` holds of an earlier run.

    Raises:
        DataError: ``out`` holds another run.
        ExpungeError: other kinds, from the parts.
    """
    progress = progress or Silent()
    _check_own(out)
    finished = None if fresh else _look(recipe, out)
    if finished is not None:
        progress.say(f"{out} holds this run, finished; --fresh runs it again")
        return finished
    own = bench is None
    bench = bench or Workbench(recipe, progress, spill_directory=out)
    bench.check(recipe)
    _claim(recipe, out, fresh=fresh)
    patch = _trained(recipe, out, bench)
    if own:
        bench.release_training()
    record = _measured(recipe, patch, bench)
    record.save(out)
    (out / STATE_NAME).unlink(missing_ok=True)
    return record


def load_artefact(out: Path) -> Artefact | None:
    """The patch or the intervention in a run directory; None if there is neither."""
    if _in(out, PATCH_NAME):
        return Patch.load(out / PATCH_NAME)
    return load_intervention(out / INTERVENTION_NAME) if _in(out, INTERVENTION_NAME) else None


def _trained(recipe: Recipe, out: Path, bench: Workbench) -> Artefact:
    """The artefact of this run: the one in ``out``, or else made and saved there."""
    # It is written last of all training, so one that is there is whole.
    patch = load_artefact(out)
    if patch is None:
        with _unclaiming(out):
            stage = Stage(out / STATE_NAME, out / LOSSES_NAME, bench.context(recipe))
            trained, _ = bench.train(recipe, stage)
        probes = bench.learning.known_probes(recipe)
        if probes:
            save_probes(out / PROBES_NAME, probes, {"base_model": published(recipe.model)})
        trained.save(out / (PATCH_NAME if isinstance(trained, Patch) else INTERVENTION_NAME))
        patch = load_artefact(out)
        assert patch is not None
    _check_trained_here(patch, out)
    _check_same_data(patch, bench.data.hashes, out)
    return patch


def _measured(recipe: Recipe, patch: Artefact, bench: Workbench) -> RunRecord:
    """The run's record, with scores if the recipe asks for them."""
    training = patch.metadata["training"]
    # The file's time is the whole run's, an interrupted part included only where it was saved.
    timing = {"evaluate": 0.0, **training["timing"]}
    scores: list[Score] = []
    if recipe.evaluate:
        with timed(timing, "evaluate"):
            scores = bench.evaluate(patch, oracle=recipe.oracle, split=recipe.measure_on)
    return RunRecord(
        function=recipe.function,
        objective=method_of(recipe).name,
        seed=recipe.seed,
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        scores=scores,
        training={key: value for key, value in training.items() if key not in ("timing", "data")},
    )


def _check_own(out: Path) -> None:
    """Refuse a folder that is not a run's: what a run writes and discards there may be a user's."""
    if out.exists() and not out.is_dir():
        raise DataError(
            what="The output folder is a file",
            got=str(out),
            allowed="a new or empty folder",
            fix="choose another -o",
        )
    names = {path.name for path in out.glob("[!.]*")}
    others = sorted(names - {RECIPE_NAME, *WORK_NAMES})
    # A recipe without any work may be one that a user wrote.
    if others and not (RECIPE_NAME in names and names & {*WORK_NAMES}):
        raise DataError(
            what="The output folder holds files that are no run's",
            got=f"{out} with {', '.join(others[:5])}{', …' if len(others) > 5 else ''}",
            allowed="a new folder, an empty one, or that of an earlier run",
            fix="choose another -o, such as a new folder within this one",
        )


def _look(recipe: Recipe, out: Path) -> RunRecord | None:
    """Refuse a folder of another run; the record if it holds this very run, finished."""
    work = [name for name in WORK_NAMES if _in(out, name)]
    # A recipe alone is a run that never took a step: nothing is lost with it.
    if not work:
        return None
    if _in(out, RECIPE_NAME):
        earlier = Recipe.load(out / RECIPE_NAME)
        if earlier.fingerprint != recipe.fingerprint:
            raise DataError(
                what="The output folder holds a run with other settings",
                got=f"{out}, which differs in {', '.join(_differences(earlier, recipe))}",
                allowed="a new folder, or the same settings to go on with an interrupted run",
                fix="choose another -o, or discard that run with --fresh",
            )
        keys = ("evaluate", "measure_on", "oracle", *MEASURING_FIELDS)
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


def _claim(recipe: Recipe, out: Path, *, fresh: bool) -> None:
    """Make ``out`` the folder of this recipe."""
    with disk_errors(out):
        if fresh:
            for name in {*WORK_NAMES} - {RECORD_NAME}:
                (out / name).unlink(missing_ok=True)
        # A record that is here is of the run to be discarded, or lacks what is to be measured.
        (out / RECORD_NAME).unlink(missing_ok=True)
        for path in out.glob(".*"):
            match = _LEFTOVER.fullmatch(path.name)
            if match and not psutil.pid_exists(int(match[1] or match[2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe.save(out / RECIPE_NAME)


@contextmanager
def _unclaiming(out: Path) -> Iterator[None]:
    """On an error before the first step, leave no folder behind that holds a recipe alone."""
    try:
        yield
    except ExpungeError:
        if [path.name for path in out.iterdir()] == [RECIPE_NAME]:
            (out / RECIPE_NAME).unlink()
            out.rmdir()
        raise


def _in(out: Path, name: str) -> bool:
    return (out / name).exists()


def _check_trained_here(patch: Artefact, out: Path) -> None:
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


def _check_same_data(patch: Artefact, hashes: Mapping[str, str], out: Path) -> None:
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


def _names(sources: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(sources, (str, Path)):
        return [str(sources)]
    return [str(source) for source in sources]
