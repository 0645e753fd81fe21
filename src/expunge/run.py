"""The composition root: a recipe becomes a patch and a run record.

A `Workbench` holds what runs of one model on one data set share: texts, the base opened up to the
deepest layer read, boundary activations, the base's scores. A single run makes one and drops it; a
demo or a comparison hands one from run to run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from expunge import provenance
from expunge.data.text import Text
from expunge.data.tokens import check_vocabulary, encode, too_short
from expunge.defaults import (
    check_layer,
    default_layer,
    default_lr,
    default_trained,
    fitting_tokens,
    resolve_device,
)
from expunge.errors import DataError, ExpungeError, RecipeError
from expunge.evaluation.suite import Suite
from expunge.files import disk_errors
from expunge.functions import FUNCTIONS
from expunge.functions.base import DataSettings, FunctionData
from expunge.model.boundaries import BoundaryStore
from expunge.model.checkpoint import Checkpoint, open_model
from expunge.model.memory import peak_bytes
from expunge.model.patch import Patch, causal_lm_name
from expunge.model.segment import Segment
from expunge.model.shards import dtype_name
from expunge.model.structure import Structure, find_structure
from expunge.objectives import OBJECTIVES, settings_of
from expunge.progress import Progress, Silent
from expunge.recipe import Recipe
from expunge.records import RECORD_NAME, ModelRole, RunRecord, Score, Split
from expunge.training.loop import Stage, Trainer, TrainingResult, TrainingSettings
from expunge.training.tradeoff import Tradeoff

RECIPE_NAME = "recipe.yaml"
PATCH_NAME = "patch.safetensors"
LOSSES_NAME = "losses.jsonl"
STATE_NAME = "state.safetensors"


def unlearn(
    model: str | Path,
    *,
    forget: str | Path | Sequence[str | Path],
    retain: str | Path | Sequence[str | Path],
    progress: Progress | None = None,
    **settings: Any,
) -> Patch:
    """Remove a language function; nothing is written and nothing but the patch is kept.

    Args:
        model: model directory, or hub name.
        forget: text source or sources to forget; each is a topic with a direction of its own.
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
    finished = None if fresh else _look(recipe, out)
    if finished is not None:
        progress.say(f"{out} holds this run, finished; --fresh runs it again")
        return finished
    own = bench is None
    bench = bench or Workbench(recipe, progress, spill_directory=out)
    bench.check(recipe)
    _claim(recipe, out, fresh=fresh)
    # The patch is written last of all training, so one that is there is whole.
    if not (out / PATCH_NAME).exists():
        with _unclaiming(out):
            stage = Stage(out / STATE_NAME, out / LOSSES_NAME, bench.context(recipe))
            trained, _ = bench.train(recipe, stage)
        trained.save(out / PATCH_NAME)
    patch = Patch.load(out / PATCH_NAME)
    _check_same_data(patch, bench.data.hashes, out)
    if own:
        bench.release_training()
    training = patch.metadata["training"]
    # The file's time is the whole run's, an interrupted part included only where it was saved.
    timing = dict(training["timing"])
    scores: list[Score] = []
    if recipe.evaluate:
        start = time.perf_counter()
        scores = bench.evaluate(patch, oracle=recipe.oracle)
        timing["evaluate"] = time.perf_counter() - start
    entry = FUNCTIONS.get(recipe.function)
    record = RunRecord(
        function=recipe.function,
        objective=recipe.objective or entry.extras["objective"],
        seed=recipe.seed,
        timing={"evaluate": 0.0, **timing},
        peak_memory_bytes=peak_bytes(),
        provenance=bench.provenance(recipe, patch),
        scores=scores,
        training={key: value for key, value in training.items() if key not in ("timing", "data")},
    )
    record.save(out)
    (out / STATE_NAME).unlink(missing_ok=True)
    return record


def _look(recipe: Recipe, out: Path) -> RunRecord | None:
    """Refuse a folder of another run; the record if it holds this very run, finished."""
    if out.exists() and not out.is_dir():
        raise DataError(
            what="The output folder is a file",
            got=str(out),
            allowed="a new or empty folder",
            fix="choose another -o",
        )
    work = [name for name in (PATCH_NAME, LOSSES_NAME, STATE_NAME, RECORD_NAME) if _in(out, name)]
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
        measured = (earlier.evaluate, earlier.oracle) == (recipe.evaluate, recipe.oracle)
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
            for name in (PATCH_NAME, LOSSES_NAME, STATE_NAME):
                (out / name).unlink(missing_ok=True)
        # A record that is here is of the run to be discarded, or lacks what is to be measured.
        (out / RECORD_NAME).unlink(missing_ok=True)
        for killed in (*out.glob(".*.tmp"), *out.glob("boundaries-*")):
            shutil.rmtree(killed) if killed.is_dir() else killed.unlink()
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


def _check_same_data(patch: Patch, hashes: Mapping[str, str], out: Path) -> None:
    """The record names the data's hashes; they must be those that the patch was trained on."""
    trained_on = patch.metadata["training"]["data"]
    changed = sorted(name for name in trained_on if trained_on[name] != hashes.get(name))
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


@dataclass
class Cut:
    """A base opened truncated and cut at some layers, with its boundary stores."""

    segment: Segment
    forget: list[BoundaryStore]
    retain: BoundaryStore


@dataclass
class _Opened:
    model: Any
    tokenizer: Any
    structure: Structure


@dataclass
class Workbench:
    """What runs of one model on one data set share.

    Runs may differ in everything that does not change data, base or device. Nothing is loaded
    before it is needed.
    """

    recipe: Recipe
    progress: Progress = field(default_factory=Silent)
    timing: dict[str, float] = field(default_factory=dict)
    spill_directory: Path | None = None

    def __post_init__(self) -> None:
        self._opened: _Opened | None = None
        self._cuts: dict[tuple[Any, ...], Cut] = {}
        self._base_scores: dict[Split, list[Score]] = {}
        self._other_scores: dict[tuple[str, Split], list[Score]] = {}
        self._whole: Any = None
        self._micro_batch_size = 0

    # ---- what is there

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base on disk."""
        return Checkpoint.open(self.recipe.model)

    @cached_property
    def device(self) -> torch.device:
        """Where models run."""
        return resolve_device(self.recipe.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of models while they run."""
        dtype: torch.dtype = getattr(torch, self.recipe.dtype)
        return dtype

    @cached_property
    def data(self) -> FunctionData:
        """The data, read, checked and split."""
        recipe = self.recipe
        load = FUNCTIONS.get(recipe.function).part
        names = DataSettings.__dataclass_fields__
        with self._timed("load"):
            # No more texts than the steps will read: the prefix runs over all of them.
            needed = min(recipe.max_texts, recipe.steps * recipe.batch_size)
            given = {name: getattr(recipe, name) for name in names} | {"max_texts": needed}
            data = load(DataSettings(**given))
        for note in data.notes:
            self.progress.say(f"note: {note}")
        return data

    @cached_property
    def n_layers(self) -> int:
        """Decoder layers of the base, from its config."""
        return self.checkpoint.n_layers

    def layers(self, recipe: Recipe) -> tuple[tuple[int, ...], int]:
        """(trained layers, deepest layer read) of a recipe."""
        layer = default_layer(self.n_layers) if recipe.layer == "auto" else recipe.layer
        if recipe.trained_layers is not None:
            return recipe.trained_layers, layer
        return default_trained(layer, self.n_layers), layer

    def check(self, recipe: Recipe) -> None:
        """Everything that can be refused before weights are read.

        Raises:
            ExpungeError: an unknown part or setting, a layer, device, model or file that is not
                there, data that cannot be used.
        """
        settings_of(OBJECTIVES.get(self._objective(recipe)), recipe.objective_settings)
        trained, layer = self.layers(recipe)
        check_layer(layer, self.n_layers)
        if not trained or min(trained) < 0 or max(trained) > layer:
            raise RecipeError(
                what="The trained layers do not fit the layer that is read",
                got=f"trained_layers {list(trained)}, layer {layer}",
                allowed=f"one layer or more from 0 to {layer}",
                fix="raise --layer, or set trained_layers to lower ones",
            )
        if recipe.oracle is not None and recipe.evaluate:
            Checkpoint.open(recipe.oracle)
        _ = self.device, self.data

    def max_tokens(self, recipe: Recipe) -> int:
        """Longest text in tokens: what the recipe asks for, within the model's context."""
        return fitting_tokens(recipe.max_tokens, self.checkpoint.config)

    # ---- training

    def cut(self, recipe: Recipe) -> Cut:
        """The base cut for a recipe, boundaries computed."""
        trained, layer = self.layers(recipe)
        key = (trained, layer, recipe.max_tokens)
        if key not in self._cuts:
            opened = self._open(layer)
            segment = Segment(opened.model, opened.structure, trained=trained, captured=(layer,))
            self._check_dtype(segment)
            self._cuts[key] = self._stores(segment, opened, recipe)
        return self._cuts[key]

    def train(self, recipe: Recipe, stage: Stage | None = None) -> tuple[Patch, TrainingResult]:
        """One run: its patch and the log. Goes on from the stage's saved state, if there is one."""
        entry = OBJECTIVES.get(self._objective(recipe))
        settings = settings_of(entry, recipe.objective_settings)
        cut = self.cut(recipe)
        lr = default_lr(cut.segment) if recipe.lr == "auto" else recipe.lr
        micro = 0 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
        weight = recipe.retain_weight
        weight = entry.extras["retain_weight"] if weight is None else weight
        trainer = Trainer(
            cut.segment,
            cut.forget,
            cut.retain,
            objective=partial(entry.part, **settings),
            tradeoff=Tradeoff(recipe.tradeoff, weight),
            settings=TrainingSettings(
                steps=recipe.steps,
                lr=lr,
                lr_schedule=recipe.lr_schedule,
                batch_size=recipe.batch_size,
                micro_batch_size=micro or self._micro_batch_size,
                weight_decay=recipe.weight_decay,
                seed=recipe.seed,
                target=entry.extras["target"] if recipe.target == "auto" else recipe.target,
                rna_noise=recipe.rna_noise,
                first_token=recipe.first_token,
                master_weights=recipe.master_weights,
                save_every=recipe.save_every,
            ),
        )
        start = time.perf_counter()
        with self.progress.phase("train", recipe.steps) as advance:
            result = trainer.run(
                stage or Stage(),
                lambda log: advance(1, f"loss {log.loss:.4f}"),
            )
        if result.micro_batch_size and result.micro_batch_size != micro:
            self.progress.say(f"texts computed at once: {result.micro_batch_size} (memory)")
        # Found by trying; later runs on this bench start from it.
        self._micro_batch_size = result.micro_batch_size
        trained, layer = self.layers(recipe)
        facts = {
            "data": dict(self.data.hashes),
            "timing": {**self.timing, "train": time.perf_counter() - start},
            "layer": layer,
            "trained_layers": list(trained),
            "lr": lr,
            "retain_weight": weight,
            "micro_batch_size": result.micro_batch_size,
            "boundary_storage": cut.retain.storage,
            "n_forget_texts": sum(len(store.texts) for store in cut.forget),
            "n_retain_texts": len(cut.retain.texts),
            "first_loss": result.log[0].loss,
            "last_loss": result.log[-1].loss,
            "last": asdict(result.log[-1]),
        }
        return self._patch(recipe, cut.segment, result, facts), result

    def _objective(self, recipe: Recipe) -> str:
        default: str = FUNCTIONS.get(recipe.function).extras["objective"]
        return recipe.objective or default

    def _check_dtype(self, segment: Segment) -> None:
        """A delta to weights that were rounded on reading would not belong to those on disk."""
        for name in (causal_lm_name(segment.model, name) for name in segment.weights):
            stored = self.checkpoint.tensors[self.checkpoint.resolve(name)].dtype
            if torch.promote_types(self.dtype, stored) != self.dtype:
                raise RecipeError(
                    what="The dtype of the run cannot hold the weights that it would train",
                    got=f"{self.recipe.dtype}, and {name} stored in {dtype_name(stored)}",
                    allowed=f"{dtype_name(stored)}, or a dtype that holds all its values",
                    fix="set dtype to float32, or save the model in that dtype first",
                )

    def _open(self, layer: int) -> _Opened:
        """The base up to a layer; opened anew only for a deeper one."""
        if self._opened is None or self._opened.structure.n_layers <= layer:
            self._opened, self._cuts = None, {}
            with self._timed("load"):
                model, tokenizer = open_model(
                    self.recipe.model,
                    layers=layer + 1,
                    dtype=self.dtype,
                    device=self.device,
                    trust_remote_code=self.recipe.trust_remote_code,
                )
                check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
                self._opened = _Opened(model, tokenizer, find_structure(model))
        return self._opened

    def _stores(self, segment: Segment, opened: _Opened, recipe: Recipe) -> Cut:
        sets = [*self.data.forget, self.data.retain]
        names = [*self.recipe.forget, "the retain texts"]
        tokens = [
            self._token_ids(name, texts, opened.tokenizer, self.max_tokens(recipe))
            for name, texts in zip(names, sets, strict=True)
        ]
        limit = int(recipe.cache_gib * 2**30)
        total = sum(len(ids) for texts in tokens for ids in texts)
        stores = [
            BoundaryStore(
                segment,
                texts,
                reference=True,
                limit_bytes=int(limit * sum(map(len, texts)) / total),
                spill_directory=self.spill_directory,
                announce=self.progress.say,
            )
            for texts in tokens
        ]
        with self._timed("prefix"), self.progress.phase("prefix", total) as advance:
            for store in stores:
                store.compute(advance)
        return Cut(segment, stores[:-1], stores[-1])

    def _token_ids(
        self, name: str, texts: Sequence[Text], tokenizer: Any, max_tokens: int
    ) -> list[tuple[int, ...]]:
        encoded = encode(texts, tokenizer, max_tokens=max_tokens)
        short = too_short(encoded)
        kept = [one.ids for index, one in enumerate(encoded) if index not in short]
        if short:
            self.progress.say(
                f"note: {name}: {len(short)} of {len(texts)} texts left out "
                f"({next(iter(short.values()))})"
            )
        if not kept:
            raise DataError(
                what=f"No text is left to train on in {name}",
                got=f"{len(texts)} texts, none of at least two tokens",
                allowed="texts that the tokenizer turns into two or more tokens",
                fix="check the file, its `field`, and max_tokens",
            )
        cut = sum(one.truncated for one in encoded)
        if cut:
            self.progress.say(
                f"note: {name}: {cut} of {len(texts)} texts cut at {max_tokens} tokens"
                + (", the model's context" if max_tokens < self.recipe.max_tokens else "")
            )
        return kept

    def _patch(
        self, recipe: Recipe, segment: Segment, result: TrainingResult, facts: dict[str, Any]
    ) -> Patch:
        names = {name: causal_lm_name(segment.model, name) for name in segment.weights}
        # Disk is the reference: the model in memory may be in a wider type than the base's file.
        before = {names[name]: p.detach().cpu() for name, p in segment.weights.items()}
        after = {names[name]: tensor for name, tensor in result.weights.items()}
        metadata = {
            "function": recipe.function,
            "objective": self._objective(recipe),
            "seed": recipe.seed,
            "base_model": Path(recipe.model).name,
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "training": facts,
        }
        return Patch.between(
            before, after, base=self.checkpoint.base_tensors(after), metadata=metadata
        )

    # ---- evaluation

    def suite(self, split: Split) -> Suite:
        """The measurements of a split, tokenised once."""
        return self._suites[split]

    @cached_property
    def _suites(self) -> dict[Split, Suite]:
        _, tokenizer = self.whole_model()
        return {
            split: Suite.build(
                tokenizer, split=split, max_tokens=self.max_tokens(self.recipe), **vars(measured)
            )
            for split, measured in self.data.measured.items()
        }

    def whole_model(self) -> tuple[Any, Any]:
        """The base with its head, for measuring."""
        if self._whole is None:
            self._whole = open_model(
                self.recipe.model,
                layers=None,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.recipe.trust_remote_code,
            )
        return self._whole  # type: ignore[no-any-return]

    def release_training(self) -> None:
        """Drop the truncated base and its boundaries, to make room for the whole model."""
        for cut in self._cuts.values():
            for store in (*cut.forget, cut.retain):
                store.close()
        self._opened, self._cuts = None, {}
        gc.collect()

    def evaluate(
        self, patch: Patch | None, *, oracle: str | None = None, split: Split = "test"
    ) -> list[Score]:
        """Scores of base, patched and oracle, in this order; the base's are taken once."""
        model, _ = self.whole_model()
        if split not in self._base_scores:
            self._base_scores[split] = self._measure(model, "base", split)
        scores = list(self._base_scores[split])
        if patch is not None:
            with patch.applied(model):
                scores += self._measure(model, "patched", split)
        if oracle is not None:
            scores += self._oracle_scores(oracle, split)
        return scores

    def _oracle_scores(self, oracle: str, split: Split) -> list[Score]:
        if (oracle, split) not in self._other_scores:
            model, tokenizer = open_model(
                oracle,
                layers=None,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.recipe.trust_remote_code,
            )
            _check_same_tokenizer(self.whole_model()[1], tokenizer, oracle)
            check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
            self._other_scores[oracle, split] = self._measure(model, "oracle", split)
        return self._other_scores[oracle, split]

    def _measure(self, model: Any, role: ModelRole, split: Split) -> list[Score]:
        suite = self.suite(split)
        with self.progress.phase(f"measure {role}", suite.rows) as advance:
            scores, _ = suite.measure(model, role, advance)
        return scores

    # ---- records

    def context(self, recipe: Recipe) -> str:
        """Fingerprint of all that the trained weights depend on: settings, data, base weights."""
        segment = self.cut(recipe).segment
        names = [causal_lm_name(segment.model, name) for name in segment.weights]
        base = self.checkpoint.base_tensors(names)
        facts = {
            "recipe": recipe.fingerprint,
            "data": dict(self.data.hashes),
            "base": {name: tensor.fingerprint for name, tensor in base.items()},
            "torch": torch.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def provenance(self, recipe: Recipe, patch: Patch) -> dict[str, Any]:
        """Recipe, hashes, versions, hardware."""
        return {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "base": {name: base.to_dict() for name, base in patch.base.items()},
            "data": dict(self.data.hashes),
            "notes": list(self.data.notes),
            "counts": {
                split: {role: len(items) for role, items in vars(measured).items()}
                for split, measured in self.data.measured.items()
            },
            **provenance.environment(),
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - start


def _check_same_tokenizer(base: Any, other: Any, name: str) -> None:
    if base.get_vocab() != other.get_vocab():
        raise DataError(
            what="The oracle has another vocabulary than the base, so their scores do not compare",
            got=name,
            allowed="a model with the base's tokenizer",
            fix="leave --oracle out, or retrain the oracle with the base's tokenizer",
        )


def _names(sources: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(sources, (str, Path)):
        return [str(sources)]
    return [str(source) for source in sources]
