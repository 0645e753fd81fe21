"""The training side of a bench: a base opened up to the deepest layer read, cut, and trained.

Runs share the opened base and its boundaries; each leaves a patch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expunge.data.text import Text
from expunge.data.tokens import encode, too_short
from expunge.defaults import default_lr, fitting_tokens, resolve_layers
from expunge.errors import DataError, RecipeError
from expunge.files import local_path
from expunge.functions import FUNCTIONS
from expunge.functions.base import FunctionData
from expunge.model.boundaries import BoundaryStore
from expunge.model.checkpoint import Checkpoint
from expunge.model.patch import Patch, causal_lm_name
from expunge.model.segment import Segment
from expunge.model.shards import dtype_name
from expunge.model.structure import Structure, find_structure
from expunge.objectives import OBJECTIVES, settings_of
from expunge.objectives.base import Objective
from expunge.progress import Progress, timed
from expunge.recipe import Recipe
from expunge.registry import Entry
from expunge.training.loop import Stage, Trainer, TrainingResult, TrainingSettings
from expunge.training.tradeoff import Tradeoff

DATA_FIELDS = ("forget", "retain", "questions", "retain_questions", "text")


def objective_of(recipe: Recipe) -> Entry[Objective]:
    """The recipe's objective, or its function's own."""
    return OBJECTIVES.get(recipe.objective or FUNCTIONS.get(recipe.function).extras["objective"])


def published(name: str) -> str:
    """A source or model as it may be shown: of a local path the last part alone.

    Patches are given away, and where things lay on a machine is nobody's business.
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


def _published_recipe(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.model_dump(mode="json", exclude_none=True)
    for key in ("model", "oracle", *DATA_FIELDS):
        value = settings.get(key)
        if isinstance(value, str):
            settings[key] = published(value)
        elif value is not None:
            settings[key] = [published(name) for name in value]
    return settings


@dataclass(frozen=True)
class Cut:
    """A base opened truncated and cut at some layers, with its boundary stores."""

    segment: Segment
    forget: list[BoundaryStore]
    retain: BoundaryStore

    @property
    def names(self) -> dict[str, str]:
        """Trained weights: name in the opened model -> name in the causal LM."""
        return {name: causal_lm_name(self.segment.model, name) for name in self.segment.weights}


@dataclass(frozen=True)
class _Opened:
    model: Any
    tokenizer: Any
    structure: Structure


class Learning:
    """Trains one recipe after another on one base and data set.

    Args:
        checkpoint: the base on disk.
        data: of all runs.
        open_model: (directory or hub name, number of layers) -> (model, tokenizer).
        progress: told what is going on.
        timing: seconds of loading and prefix are added here.
        spill_directory: where boundaries go that are too large for RAM.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: FunctionData,
        *,
        open_model: Callable[[str, int], tuple[Any, Any]],
        progress: Progress,
        timing: dict[str, float],
        spill_directory: Path | None = None,
    ) -> None:
        self.checkpoint, self.data, self.open_model = checkpoint, data, open_model
        self.progress, self.timing = progress, timing
        self.spill_directory = spill_directory
        self._opened: _Opened | None = None
        self._cuts: dict[tuple[Any, ...], Cut] = {}
        self._micro_batch_size = 0
        self._told: dict[str, float] = {}

    def train(self, recipe: Recipe, stage: Stage | None = None) -> tuple[Patch, TrainingResult]:
        """One run: its patch and the log. Goes on from the stage's saved state, if there is one."""
        entry = objective_of(recipe)
        cut = self.cut(recipe)
        weight = recipe.retain_weight
        weight = entry.extras["retain_weight"] if weight is None else weight
        micro = 0 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
        chosen = {
            "lr": default_lr(cut.segment) if recipe.lr == "auto" else recipe.lr,
            "target": entry.extras["target"] if recipe.target == "auto" else recipe.target,
            "micro_batch_size": micro or self._micro_batch_size,
        }
        names = TrainingSettings.__dataclass_fields__
        settings = TrainingSettings(**{name: getattr(recipe, name) for name in names} | chosen)
        trainer = Trainer(
            cut.segment,
            cut.forget,
            cut.retain,
            objective=partial(entry.part, **settings_of(entry, recipe.objective_settings)),
            tradeoff=Tradeoff(recipe.tradeoff, weight),
            settings=settings,
            forget_reference=entry.extras["needs"].forget_reference,
        )
        with self.progress.phase("train", recipe.steps) as advance:
            result = trainer.run(
                stage or Stage(),
                lambda log: advance(1, f"loss {log.loss:.4f}"),
            )
        if result.micro_batch_size and result.micro_batch_size != micro:
            self.progress.say(f"texts computed at once: {result.micro_batch_size} (memory)")
        # Found by trying; later runs on this bench start from it.
        self._micro_batch_size = result.micro_batch_size
        trained, layer = self._layers(recipe)
        facts = {
            "data": as_published(self.data.hashes),
            # The log's sum counts all of a run that was interrupted.
            "timing": {**self._since_last(), "train": sum(log.seconds for log in result.log)},
            "layer": layer,
            "trained_layers": list(trained),
            "lr": settings.lr,
            "retain_weight": weight,
            "micro_batch_size": result.micro_batch_size,
            "boundary_storage": cut.retain.storage,
            "n_forget_texts": sum(len(store.texts) for store in cut.forget),
            "n_retain_texts": len(cut.retain.texts),
            "first_loss": result.log[0].loss,
            "last_loss": result.log[-1].loss,
            "last": asdict(result.log[-1]),
        }
        return self._patch(recipe, cut, result, facts), result

    def cut(self, recipe: Recipe) -> Cut:
        """The base cut for a recipe, with all the boundaries that its objective needs."""
        trained, layer = self._layers(recipe)
        key = (trained, layer, recipe.max_tokens)
        opened = self._open(recipe.model, layer)
        if key not in self._cuts:
            segment = Segment(opened.model, opened.structure, trained=trained, captured=(layer,))
            self._check_dtype(segment)
            self._cuts[key] = self._stores(segment, opened.tokenizer, recipe)
        cut = self._cuts[key]
        if objective_of(recipe).extras["needs"].forget_reference:
            for store in cut.forget:
                store.add_reference()
        self._compute(cut)
        return cut

    def release(self) -> None:
        """Drop the truncated base and its boundaries."""
        for cut in self._cuts.values():
            for store in (*cut.forget, cut.retain):
                store.close()
        self._opened, self._cuts = None, {}
        gc.collect()

    def _since_last(self) -> dict[str, float]:
        """Seconds spent since the last run on this bench; what the two share counts for that."""
        names = ("load", "prefix")
        spent = {name: self.timing.get(name, 0.0) - self._told.get(name, 0.0) for name in names}
        self._told = dict(self.timing)
        return spent

    def _layers(self, recipe: Recipe) -> tuple[tuple[int, ...], int]:
        return resolve_layers(recipe.layer, recipe.trained_layers, self.checkpoint.n_layers)

    def _open(self, name: str, layer: int) -> _Opened:
        """The base up to a layer; opened anew only for a deeper one."""
        if self._opened is None or self._opened.structure.n_layers <= layer:
            self._opened, self._cuts = None, {}
            with timed(self.timing, "load"):
                model, tokenizer = self.open_model(name, layer + 1)
                self._opened = _Opened(model, tokenizer, find_structure(model))
        return self._opened

    def _check_dtype(self, segment: Segment) -> None:
        """A delta to weights that were rounded on reading would not belong to those on disk."""
        for own_name, weight in segment.weights.items():
            name = causal_lm_name(segment.model, own_name)
            stored = self.checkpoint.tensors[self.checkpoint.resolve(name)].dtype
            if torch.promote_types(weight.dtype, stored) != weight.dtype:
                raise RecipeError(
                    what="The dtype of the run cannot hold the weights that it would train",
                    got=f"{dtype_name(weight.dtype)}, and {name} stored in {dtype_name(stored)}",
                    allowed=f"{dtype_name(stored)}, or a dtype that holds all its values",
                    fix="set dtype to float32, or save the model in that dtype first",
                )

    def _stores(self, segment: Segment, tokenizer: Any, recipe: Recipe) -> Cut:
        """The cut with its stores, not yet computed."""
        sets = [*self.data.forget, self.data.retain]
        names = [*recipe.forget, "the retain texts"]
        tokens = [
            self._token_ids(name, texts, tokenizer, recipe.max_tokens)
            for name, texts in zip(names, sets, strict=True)
        ]
        limit = int(recipe.cache_gib * 2**30)
        total = sum(len(ids) for texts in tokens for ids in texts)
        *forget, retain = (
            BoundaryStore(
                segment,
                texts,
                reference=texts is tokens[-1],
                limit_bytes=int(limit * sum(map(len, texts)) / total),
                spill_directory=self.spill_directory,
                announce=self.progress.say,
            )
            for texts in tokens
        )
        return Cut(segment, forget, retain)

    def _compute(self, cut: Cut) -> None:
        missing = [store for store in (*cut.forget, cut.retain) if not store.computed]
        if not missing:
            return
        total = sum(store.n_tokens for store in missing)
        with timed(self.timing, "prefix"), self.progress.phase("prefix", total) as advance:
            for store in missing:
                store.compute(advance)

    def _token_ids(
        self, name: str, texts: Sequence[Text], tokenizer: Any, asked: int
    ) -> list[tuple[int, ...]]:
        max_tokens = fitting_tokens(asked, self.checkpoint.config)
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
                + (", the model's context" if max_tokens < asked else "")
            )
        return kept

    def _patch(
        self, recipe: Recipe, cut: Cut, result: TrainingResult, facts: dict[str, Any]
    ) -> Patch:
        # Disk is the reference: the model in memory may be in a wider type than the base's file.
        before = {cut.names[name]: p.detach().cpu() for name, p in cut.segment.weights.items()}
        after = {cut.names[name]: tensor for name, tensor in result.weights.items()}
        metadata = {
            "function": recipe.function,
            "objective": objective_of(recipe).name,
            "seed": recipe.seed,
            "base_model": published(recipe.model),
            "recipe": _published_recipe(recipe),
            "training": facts,
        }
        return Patch.between(
            before, after, base=self.checkpoint.base_tensors(after), metadata=metadata
        )
