"""What runs of one model on one data set share, so that a demo or a comparison pays for it once."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sklearn
import torch

from expunge import provenance
from expunge.cuts import Opened
from expunge.defaults import fitting_tokens, resolve_device
from expunge.editing import make_edit, search_edit
from expunge.errors import DataError, RecipeError, ResourceError
from expunge.evaluation.generation import Sampling, check_prompts
from expunge.evaluation.scorers import Scorer, build_scorers
from expunge.files import local_path
from expunge.functions import FUNCTIONS
from expunge.functions.base import DataSettings, FunctionData
from expunge.learning import Learning, method_of, reads_outputs
from expunge.measuring import Artefact, Measurements, Measuring
from expunge.metalearning.calibration import CALIBRATION_NAME, Calibration, calibrate
from expunge.metalearning.episodes import EPISODES_NAME, RULE, lessons
from expunge.metalearning.exploring import Players, explore
from expunge.metalearning.looking import guard, kind_of, knob_ranges
from expunge.model.apply import part_within
from expunge.model.checkpoint import Checkpoint, open_model, open_tokenizer
from expunge.model.patch import BaseTensor, Patch
from expunge.model.shards import fingerprint
from expunge.model.structure import find_structure
from expunge.objectives.base import Activations, Logprobs
from expunge.presets import find_preset
from expunge.progress import Progress, Silent, timed
from expunge.recipe import Recipe
from expunge.records import Score, Split
from expunge.registry import settings_of
from expunge.steering import check_layers
from expunge.training.loop import Stage, TrainingResult
from expunge.training.order import ORDER
from expunge.training.tradeoff import EXPLORING

# What trained weights depend on besides what a user gives; of the package's own rules, the order.
CODE = {"order": ORDER, "torch": torch.__version__, "sklearn": sklearn.__version__}


@dataclass
class Workbench:
    """The base on disk, the data, and the two sides that work on them: learning and measuring.

    Runs may differ in everything that does not change data, base or device
    (`Recipe.bench_key`). Nothing is loaded before it is needed.

    Attributes:
        start: what the base is changed by before anything is learned of it; the patches of this
            bench come on top. Measuring knows nothing of it.
    """

    recipe: Recipe
    progress: Progress = field(default_factory=Silent)
    timing: dict[str, float] = field(default_factory=dict)
    spill_directory: Path | None = None
    start: Patch | None = None
    _calibrations: dict[str, Calibration | None] = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base on disk."""
        return Checkpoint.open(self.recipe.model)

    @cached_property
    def device(self) -> torch.device:
        """Where models run."""
        return resolve_device(self.recipe.device)

    @cached_property
    def data(self) -> FunctionData:
        """The data, read, checked and split."""
        recipe = self.recipe
        load = FUNCTIONS.get(recipe.function).part
        names = DataSettings.__dataclass_fields__
        with timed(self.timing, "load"):
            given = {name: getattr(recipe, name) for name in names}
            data = load(DataSettings(**{**given, "max_texts": recipe.texts_needed}))
        for note in data.notes:
            self.progress.say(f"note: {note}")
        return data

    @cached_property
    def learning(self) -> Learning:
        """The training side."""
        return Learning(
            self.checkpoint,
            self.data,
            open_model=self._open_to_learn,
            progress=self.progress,
            timing=self.timing,
            spill_directory=self.spill_directory,
        )

    @cached_property
    def measuring(self) -> Measuring:
        """The measuring side."""
        return Measuring(
            self.recipe.model,
            self.data.measured,
            open_model=self._open,
            max_tokens=fitting_tokens(self.recipe.max_tokens, self.checkpoint.config),
            progress=self.progress,
            scorers=self.scorers,
            sampling=Sampling(
                samples=self.recipe.samples,
                new_tokens=self.recipe.new_tokens,
                temperature=self.recipe.temperature,
                seed=self.recipe.sampling_seed,
            ),
            max_prompts=self.recipe.max_prompts,
        )

    @cached_property
    def scorers(self) -> tuple[Scorer, ...]:
        """What judges continuations; none where nothing is continued."""
        if not any(measured.prompts for measured in self.data.measured.values()):
            return ()
        return build_scorers(self.recipe.scorers, self.data.labelled, device=str(self.device))

    @cached_property
    def _scorer_files(self) -> dict[str, str]:
        """SHA-256 of the files that scorers were fitted on or read."""
        paths = {spec: local_path(spec.partition(":")[2]) for spec in self.recipe.scorers}
        return {
            spec: hashlib.sha256(path.read_bytes()).hexdigest()
            for spec, path in paths.items()
            if ":" in spec and path.is_file()
        }

    def check(self, recipe: Recipe) -> None:
        """Everything that can be refused before weights are read.

        Raises:
            ExpungeError: an unknown part or setting, a layer, device, model or file that is not
                there, data that cannot be used.
        """
        if recipe.bench_key != self.recipe.bench_key:
            raise ValueError("this bench was made for another model or other data")
        method = method_of(recipe)
        settings_of(method, recipe.objective_settings)
        searched = recipe.tradeoff == "search" and bool(method.extras.get("choices"))
        if method.kind == "edit" and recipe.tradeoff != "fixed" and not searched:
            raise RecipeError(
                what=f"{method.name} trains nothing, so there is no trade-off to set",
                got=f"tradeoff {recipe.tradeoff}",
                allowed="fixed, the default, for an edit; search, for one with choices to try",
                fix="leave --tradeoff out, or choose an objective; `expunge ls` lists them",
            )
        needs = method.extras.get("needs")
        if recipe.reward == "representation" and (isinstance(needs, Logprobs) or searched):
            raise RecipeError(
                what=f"{method.name} reads no layer whose activations could be looked at",
                got="reward representation",
                allowed="accuracy or likelihood",
                fix="set reward=auto, or choose an objective that reads activations",
            )
        if recipe.policy_from is not None:
            self._check_policy(recipe, recipe.policy_from)
        if "needs" in method.extras:
            check_layers(recipe, method.extras["needs"], self.checkpoint.n_layers)
        if recipe.oracle is not None and recipe.evaluate:
            Checkpoint.open(recipe.oracle)
        _ = self.device, self.data
        if recipe.evaluate:
            _ = self.scorers
            self._check_prompts(recipe)

    def _check_policy(self, recipe: Recipe, folder: str) -> None:
        if recipe.tradeoff != "learned":
            raise RecipeError(
                what="A policy is of use to a learned trade-off alone",
                got=f"policy_from {folder}, tradeoff {recipe.tradeoff}",
                allowed="policy_from together with tradeoff learned",
                fix="add --tradeoff learned, or leave policy_from out",
            )
        lessons(Path(folder), kind_of(recipe), knob_ranges(recipe))

    def _check_prompts(self, recipe: Recipe) -> None:
        """Prompts that cannot be continued are told before anything is trained."""
        sets = self.data.measured[recipe.measure_on].prompts
        if sets:
            tokenizer = open_tokenizer(
                self.checkpoint.directory, trust_remote_code=recipe.trust_remote_code
            )
        for prompts in sets.values():
            texts = [prompt.text for prompt in prompts[: recipe.max_prompts]]
            check_prompts(tokenizer, texts, self.checkpoint.text_config, recipe.new_tokens)

    def train(
        self,
        recipe: Recipe,
        stage: Stage | None = None,
        folder: Path | None = None,
        players: Players | None = None,
    ) -> tuple[Artefact, TrainingResult | None]:
        """One run: its patch and the log. Goes on from the stage's saved state, if there is one.

        An edit trains nothing, so it has no log, and some leave an intervention.

        Args:
            folder: where a learned trade-off keeps its episodes and its front.
            players: have these play its episodes, where there is a folder.
        """
        if method_of(recipe).kind == "edit":
            make = search_edit if recipe.tradeoff == "search" else make_edit
            return make(self.learning, recipe), None
        recipe, facts = self.settled(recipe, folder)
        if recipe.tradeoff not in EXPLORING:
            watch = guard(self.learning, recipe)
            patch, result = self.learning.train(recipe, stage, watch)
        elif folder is not None:
            patch, result = explore(self.learning, recipe, folder, stage or Stage(), players)
        else:
            with tempfile.TemporaryDirectory() as name:
                own = Stage(state=Path(name) / "state.safetensors")
                patch, result = explore(self.learning, recipe, Path(name), own)
        training = {**patch.metadata["training"], **facts}
        return replace(patch, metadata={**patch.metadata, "training": training}), result

    def settled(self, recipe: Recipe, folder: Path | None = None) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with its layer decided, and how: given, a preset's, or calibrated.

        Args:
            folder: of the run, where a calibration is kept for a resume.
        """
        known = find_preset(self.checkpoint.config)
        if known is not None and _wants_a_layer(recipe):
            layers = {name: known.settings[name] for name in ("layer", "trained_layers")}
            if recipe.trained_layers is not None:
                del layers["trained_layers"]
            return recipe.updated(**layers), {"preset": known.name}
        found = self._calibration(recipe, folder) if self.calibrates(recipe) else None
        if found is None:
            return recipe, {}
        return recipe.updated(layer=found.layer), {"calibration": found.to_dict()}

    def calibrates(self, recipe: Recipe) -> bool:
        """Whether the recipe's layer is found by short runs."""
        known = find_preset(self.checkpoint.config)
        return recipe.calibrate and known is None and _wants_a_layer(recipe)

    def _calibration(self, recipe: Recipe, folder: Path | None) -> Calibration | None:
        """What short runs say of the layers, tried once on a bench; None where they cannot."""
        key = recipe.updated(seed=0).fingerprint
        rests_on = _digest_of([key, dict(self.data.hashes), kind_of(recipe), CODE])
        if key not in self._calibrations and folder is not None:
            earlier = Calibration.load(folder / CALIBRATION_NAME, rests_on)
            if earlier is not None:
                self._calibrations[key] = earlier
        if key not in self._calibrations:
            try:
                self._calibrations[key] = calibrate(self.learning, recipe)
            except (DataError, ResourceError) as error:
                self.progress.say(f"note: the usual layer is read: {error.what} ({error.got})")
                self._calibrations[key] = None
            # Looks open the whole model; a run that needs a part of it holds no more than that.
            if not reads_outputs(recipe):
                self.learning.release()
        found = self._calibrations[key]
        if found is not None and folder is not None:
            found.save(folder / CALIBRATION_NAME, rests_on)
        return found

    def drop_boundaries(self) -> None:
        """Drop what is stored of the texts that are learned from; the models stay."""
        if "learning" in vars(self):
            self.learning.drop_cuts()

    def release_training(self) -> None:
        """Drop the truncated base and its boundaries, to make room for the whole model."""
        self.learning.release()

    def measure(
        self, patch: Artefact | None, *, oracle: str | None = None, split: Split = "test"
    ) -> Measurements:
        """All that is measured of base, patched and oracle; the base's is taken once."""
        return self.measuring.measure(patch, oracle=oracle, split=split)

    def probe_accuracy(self, recipe: Recipe, patch: Artefact) -> dict[str, Any]:
        """How well fresh probes tell the classes apart, before and after: `Probing.accuracy`."""
        model, tokenizer = self.measuring.whole
        opened = Opened(model, tokenizer, find_structure(model), whole=True)
        found = self.learning.probing.accuracy(recipe, patch, opened)
        # It is told as measuring; the next run on this bench did not spend it.
        self.learning.since_last()
        return found

    def evaluate(
        self, patch: Artefact | None, *, oracle: str | None = None, split: Split = "test"
    ) -> list[Score]:
        """The scores alone of base, patched and oracle, in this order."""
        return self.measure(patch, oracle=oracle, split=split).scores

    def context(self, recipe: Recipe, folder: Path | None = None) -> str:
        """Fingerprint of all that the trained weights depend on: settings, data, base, versions."""
        if method_of(recipe).kind == "edit":
            return ""  # done at once, there is nothing to go on with
        settled, _ = self.settled(recipe, folder)
        base = self.checkpoint.base_tensors(self.learning.cut(settled).names.values())
        facts = {
            "recipe": recipe.fingerprint,
            "data": dict(self.data.hashes),
            "base": {name: tensor.fingerprint for name, tensor in base.items()},
            # Probes are fitted again on resume; they must come out the same.
            "directions": self._directions(settled),
            **({"policy": _digest(recipe.policy_from)} if recipe.policy_from else {}),
            "code": CODE,
        }
        if recipe.tradeoff in EXPLORING:
            # What was found by other looks or knobs is not gone on with, whatever "auto" means.
            facts |= {"looks": kind_of(recipe), "knobs": knob_ranges(recipe), "rule": RULE}
        if self.start is not None:
            facts["start"] = {
                name: fingerprint(delta, delta.dtype) for name, delta in self.start.deltas.items()
            }
        return _digest_of(facts)

    def provenance(self, recipe: Recipe, patch: Artefact) -> dict[str, Any]:
        """Recipe, hashes, versions, hardware."""
        return {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "base": {name: base.to_dict() for name, base in _base(patch).items()},
            "data": dict(self.data.hashes),
            "notes": list(self.data.notes),
            "scorers": {scorer.name: scorer.about for scorer in self.scorers},
            "scorer_files": self._scorer_files,
            "counts": {
                split: {role: _count(items) for role, items in vars(measured).items()}
                for split, measured in self.data.measured.items()
            },
            **provenance.environment(),
        }

    def _directions(self, recipe: Recipe) -> str:
        digest = hashlib.sha256()
        for layer, direction in sorted(self.learning.where(recipe).directions.items()):
            digest.update(f"{layer} {direction.weight}".encode())
            digest.update(direction.unit_D.numpy().tobytes())
        return digest.hexdigest()

    def _open(self, name: str, layers: int | None = None) -> tuple[Any, Any]:
        """(model, tokenizer) of a directory or hub name, whole or up to a number of layers."""
        return open_model(
            name,
            layers=layers,
            dtype=getattr(torch, self.recipe.dtype),
            device=self.device,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def _open_to_learn(self, name: str, layers: int | None = None) -> tuple[Any, Any]:
        """As `_open`, with what the base is changed by before."""
        model, tokenizer = self._open(name, layers)
        if self.start is not None:
            start = self.start if layers is None else part_within(self.start, model)
            start.apply_(model)
        return model, tokenizer


def _wants_a_layer(recipe: Recipe) -> bool:
    """Whether the recipe's layer is to be found, and is read: not those of probes, nor outputs."""
    needs = method_of(recipe).extras.get("needs")
    reads = isinstance(needs, Activations) and needs.probes == "none"
    return reads and recipe.layer == "auto"


def _digest_of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(folder: str) -> str:
    """Of the episodes that a policy is learned from."""
    return hashlib.sha256((Path(folder) / EPISODES_NAME).read_bytes()).hexdigest()


def _base(artefact: Artefact) -> Mapping[str, BaseTensor]:
    return artefact.base if isinstance(artefact, Patch) else {}


def _count(items: Collection[Any]) -> int | dict[str, int]:
    """How many there are; of prompts, in each set."""
    if isinstance(items, Mapping):
        return {name: len(texts) for name, texts in items.items()}
    return len(items)
