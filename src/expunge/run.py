"""The composition root: a recipe becomes a patch and a run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.errors import DataError, RecipeError
from expunge.folder import (
    INTERVENTION_NAME,
    LOSSES_NAME,
    PATCH_NAME,
    PROBES_NAME,
    STATE_NAME,
    check_own,
    check_same_data,
    check_trained_here,
    claim,
    holds,
    load_artefact,
    look,
    unclaiming,
)
from expunge.learning import method_of
from expunge.measuring import Artefact, Measurements
from expunge.model.memory import peak_bytes
from expunge.model.patch import Patch
from expunge.players import players_of
from expunge.probes.probe import save_probes
from expunge.processes import check_importable, one_thread
from expunge.progress import Progress, Silent, timed
from expunge.published import published
from expunge.recipe import Recipe
from expunge.records import RECORD_NAME, RunRecord
from expunge.training.log import StepLog, curve, read_losses
from expunge.training.loop import Stage
from expunge.workbench import Workbench


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
    workers: int | None = 1,
) -> RunRecord:
    """Train, save and measure; or go on where an interrupted run of the same recipe stopped.

    Leaves ``recipe.yaml``, ``patch.safetensors``, ``record.json`` and ``losses.jsonl`` in ``out``,
    and of a learned trade-off ``episodes.jsonl``, ``front.json`` and ``front/``.

    Args:
        recipe: the run's settings.
        out: its folder; one run each.
        progress: told what is going on; default: silent.
        bench: shared with other runs of the same model and data.
        fresh: discard what ``out`` holds of an earlier run.
        workers: processes that play the episodes of a learned or searched trade-off; None: a few,
            where they gain (`expunge.players`). A script that asks for anything but 1 must guard
            its own doing by ``if __name__ == "__main__"``, since they import it.

    Raises:
        DataError: ``out`` holds another run.
        ExpungeError: other kinds, from the parts.
    """
    progress = progress or Silent()
    if workers != 1:
        check_importable()
    check_own(out)
    finished = None if fresh else look(recipe, out)
    if finished is not None:
        progress.say(f"{out} holds this run, finished; --fresh runs it again")
        return finished
    own = bench is None
    bench = bench or Workbench(recipe, progress, spill_directory=out)
    bench.check(recipe)
    reads = {} if fresh else _reads_so_far(out, progress)
    claim(recipe, out, fresh=fresh)
    patch = _trained(recipe, out, bench, workers)
    if own:
        bench.release_training()
    record = measured(recipe, patch, bench, reads, read_losses(out / LOSSES_NAME))
    record.save(out)
    (out / STATE_NAME).unlink(missing_ok=True)
    return record


def _trained(recipe: Recipe, out: Path, bench: Workbench, workers: int | None) -> Artefact:
    """The artefact of this run: the one in ``out``, or else made and saved there."""
    # It is written last of all training, so one that is there is whole.
    patch = load_artefact(out)
    if patch is None:
        with unclaiming(out), players_of(recipe, bench, workers, out) as players:
            with one_thread(really=players is not None):
                context = bench.context(recipe, out)
            stage = Stage(out / STATE_NAME, out / LOSSES_NAME, context)
            trained, _ = bench.train(recipe, stage, out, players)
        probes = bench.learning.known_probes(recipe)
        if probes:
            save_probes(out / PROBES_NAME, probes, {"base_model": published(recipe.model)})
        trained.save(out / (PATCH_NAME if isinstance(trained, Patch) else INTERVENTION_NAME))
        patch = load_artefact(out)
        assert patch is not None
    check_trained_here(patch, out)
    check_same_data(patch, bench.data.hashes, out)
    return patch


def measured(
    recipe: Recipe,
    patch: Artefact,
    bench: Workbench,
    reads: Mapping[str, int],
    log: Sequence[StepLog],
) -> RunRecord:
    """The run's record, with scores if the recipe asks for them.

    Args:
        reads: how often each split was read before, training included; empty for a patch that was
            not measured yet.
        log: of the training, for its curves.
    """
    training = patch.metadata["training"]
    # The file's time is the whole run's, an interrupted part included only where it was saved.
    timing = {"evaluate": 0.0, **training["timing"]}
    reads = dict(reads) or {"validation": looks_of(training), "test": 0}
    found = Measurements()
    # Before the test split is read: what fails here leaves nothing uncounted.
    if recipe.measure_probes:
        with timed(timing, "evaluate"):
            training = {**training, "probe_accuracy": bench.probe_accuracy(recipe, patch)}
    if recipe.evaluate:
        with timed(timing, "evaluate"):
            found = bench.measure(patch, oracle=recipe.oracle, split=recipe.measure_on)
        reads[recipe.measure_on] = reads.get(recipe.measure_on, 0) + 1
    facts = {key: value for key, value in training.items() if key not in ("timing", "data")}
    return RunRecord(
        function=recipe.function,
        objective=method_of(recipe).name,
        seed=recipe.seed,
        timing=timing,
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        training={**facts, "split_reads": reads, "curve": curve(log)},
        **vars(found),
    )


def looks_of(training: Mapping[str, Any]) -> int:
    """How often training looked at validation, calibration included."""
    tried = training.get("calibration", {}).get("tried", ())
    return int(training.get("looks", 0)) + sum(len(one["points"]) for one in tried)


def _reads_so_far(out: Path, progress: Progress) -> dict[str, int]:
    """What the record of this folder counts; it is about to be replaced by one that goes on."""
    if not holds(out, RECORD_NAME):
        return {}
    try:
        return dict(RunRecord.load(out).training.get("split_reads", {}))
    except DataError as error:
        progress.say(f"note: readings of the splits are counted anew: {error.what}")
        return {}


def _names(sources: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(sources, (str, Path)):
        return [str(sources)]
    return [str(source) for source in sources]
