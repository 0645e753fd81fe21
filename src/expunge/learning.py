"""The training side of a bench: a base opened up to the deepest layer read, cut, and trained.

Runs share the opened base and its boundaries; each leaves a patch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.cuts import Cut, Cuts, Opened, Tokens, Where, cut_with_stores, depth_of, unpaired
from expunge.defaults import SHALLOW, check_trained, default_lr, resolve_layers
from expunge.edits import EDITS
from expunge.errors import RecipeError
from expunge.evaluation.looks import OutputLook
from expunge.functions import FUNCTIONS
from expunge.functions.base import FunctionData
from expunge.model.checkpoint import Checkpoint
from expunge.model.patch import Patch, causal_lm_name
from expunge.model.segment import LOGPROBS, Segment
from expunge.model.shards import dtype_name
from expunge.model.structure import find_structure
from expunge.objectives import OBJECTIVES
from expunge.objectives.base import Logprobs, Needs, Objective
from expunge.probes.probe import Probe
from expunge.probing import Probing
from expunge.progress import Progress, timed
from expunge.published import as_published, published, published_recipe
from expunge.recipe import Recipe
from expunge.registry import Entry, nearest, settings_of
from expunge.steering import directions_for
from expunge.training.log import ends_of
from expunge.training.loop import Stage, Trainer, TrainingResult
from expunge.training.settings import TrainingSettings
from expunge.training.tradeoff import EXPLORING, Tradeoff, rule
from expunge.training.watch import Watch


def objective_of(recipe: Recipe) -> Entry[Objective]:
    """The recipe's objective, or its function's own."""
    return OBJECTIVES.get(recipe.objective or FUNCTIONS.get(recipe.function).extras["objective"])


def needs_of(recipe: Recipe) -> Needs:
    """What the recipe's objective must be given, with its settings."""
    entry = objective_of(recipe)
    needs: Needs = entry.extras["needs"]
    return needs.given(settings_of(entry, recipe.objective_settings))


def method_of(recipe: Recipe) -> Entry[Any]:
    """The objective or the edit that a recipe names. Raises RecipeError if it is neither."""
    name = recipe.objective
    if name is not None and name in EDITS:
        return EDITS.get(name)
    if name is not None and name not in OBJECTIVES:
        known = [*OBJECTIVES.names(), *EDITS.names()]
        raise RecipeError(
            what="Unknown objective",
            got=repr(name),
            allowed=", ".join(known),
            fix=nearest(name, known),
        )
    return objective_of(recipe)


class Learning:
    """Trains one recipe after another on one base and data set.

    Args:
        checkpoint: the base on disk.
        data: of all runs.
        open_model: (directory or hub name, number of layers or None for all and the head) ->
            (model, tokenizer).
        progress: told what is going on.
        timing: seconds of loading and prefix are added here.
        spill_directory: where boundaries go that are too large for RAM.

    Attributes:
        looks: those at the opened base that were made (`expunge.metalearning.looking`), by what
            they look at.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: FunctionData,
        *,
        open_model: Callable[[str, int | None], tuple[Any, Any]],
        progress: Progress,
        timing: dict[str, float],
        spill_directory: Path | None = None,
    ) -> None:
        self.checkpoint, self.data, self.open_model = checkpoint, data, open_model
        self.progress, self.timing = progress, timing
        self.spill_directory = spill_directory
        self._opened: Opened | None = None
        self._cuts = Cuts()
        self.looks: dict[Hashable, OutputLook] = {}
        self._tokens: dict[int, Tokens] = {}
        self.probing = Probing(
            checkpoint.n_layers,
            paired=data.paired,
            open_base=self.opened,
            tokens=self.tokens,
            progress=progress,
            timing=timing,
        )
        self.micro_batch_size = 0
        self._told: dict[str, float] = {}

    def train(
        self, recipe: Recipe, stage: Stage | None = None, watch: Watch | None = None
    ) -> tuple[Patch, TrainingResult]:
        """One run: its patch and the log. Goes on from the stage's saved state, if there is one.

        Args:
            watch: looks at validation on the way.
        """
        weighing = rule(recipe.tradeoff, float(self.usual(recipe)["retain_weight"]))
        trainer = self.trainer(recipe, weighing, watch)
        with self.progress.phase("train", recipe.steps) as advance:
            result = trainer.run(
                stage or Stage(),
                lambda log: advance(1, f"loss {log.loss:.4f}"),
            )
        looks = 0
        if watch is not None:
            watch.tell_collapse(self.progress.say)
            looks = len(watch.points)
        return self.patch(recipe, result, looks=looks), result

    def usual(self, recipe: Recipe) -> dict[str, Any]:
        """What a run without learning uses: ``lr``, ``retain_weight``, the objective's settings."""
        entry = objective_of(recipe)
        weight = recipe.retain_weight
        return {
            **settings_of(entry, recipe.objective_settings),
            "lr": default_lr(self.cut(recipe).segment) if recipe.lr == "auto" else recipe.lr,
            "retain_weight": entry.extras["retain_weight"] if weight is None else weight,
        }

    def trainer(
        self,
        recipe: Recipe,
        tradeoff: Tradeoff,
        watch: Watch | None,
        *,
        steps: int | None = None,
        beside: Sequence[Trainer] = (),
        balance: bool = True,
    ) -> Trainer:
        """A trainer on this bench; with ``steps``, of a run's beginning. The rest: `Trainer`."""
        entry = objective_of(recipe)
        cut = self.cut(recipe)
        micro = 0 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
        chosen = {
            "lr": self.usual(recipe)["lr"],
            "steps": steps or recipe.steps,
            "whole_steps": recipe.steps,
            "target": entry.extras["target"] if recipe.target == "auto" else recipe.target,
            "micro_batch_size": micro or self.micro_batch_size,
        }
        names = TrainingSettings.__dataclass_fields__.keys() - chosen.keys()
        return Trainer(
            cut.segment,
            cut.forget,
            cut.retain,
            objective=partial(entry.part, **settings_of(entry, recipe.objective_settings)),
            tradeoff=tradeoff,
            settings=TrainingSettings(**{n: getattr(recipe, n) for n in names}, **chosen),
            needs=needs_of(recipe),
            twins=cut.twins,
            directions=self.where(recipe).directions,
            watch=watch,
            beside=beside,
            balance=balance,
        )

    def patch(self, recipe: Recipe, result: TrainingResult, **more: Any) -> Patch:
        """What a trainer of this recipe left, with all that is known of its origin."""
        cut, where = self.cut(recipe), self.where(recipe)
        if result.micro_batch_size and result.micro_batch_size != recipe.micro_batch_size:
            self.progress.say(f"texts computed at once: {result.micro_batch_size} (memory)")
        # Found by trying; later runs on this bench start from it.
        self.micro_batch_size = result.micro_batch_size
        usual, log = self.usual(recipe), result.log
        facts = {
            "data": self.data_hashes,
            # The log's sum counts all of a run that was interrupted.
            "timing": {**self.since_last(), "train": sum(entry.seconds for entry in log)},
            "layer": max((layer for layer in where.captured if layer != LOGPROBS), default=None),
            "read_layers": [layer for layer in where.captured if layer != LOGPROBS],
            "trained_layers": list(where.trained),
            "lr": usual["lr"],
            "retain_weight": usual["retain_weight"],
            "micro_batch_size": result.micro_batch_size,
            "boundary_storage": cut.retain.storage,
            "n_forget_texts": sum(len(store.texts) for store in cut.forget),
            "n_retain_texts": len(cut.retain.texts),
            **ends_of(log),
            "collapsed": result.collapsed,
            "restored": result.restored,
            **more,
        }
        return self.patch_of(recipe, result.weights, facts)

    def cut(self, recipe: Recipe) -> Cut:
        """The base cut for a recipe, with all the boundaries that its objective needs."""
        needs = needs_of(recipe)
        where = self.where(recipe)
        depth = None if reads_outputs(recipe) else depth_of(where.captured)
        opened = self.opened(recipe.model, depth)
        twins = self._wants_twins(needs)
        texts = recipe.texts_needed
        key = (where.trained, where.captured, twins, recipe.max_tokens, texts)
        cut = self._cuts.take(key)
        if cut is None:
            segment = Segment(
                opened.model, opened.structure, trained=where.trained, captured=where.captured
            )
            self.check_dtype(segment.model, segment.weights)
            cut = cut_with_stores(
                segment,
                self.tokens(recipe).first(texts),
                twins=twins,
                spill_directory=self.spill_directory,
                announce=self.progress.say,
            )
        if needs.forget_reference:
            for store in cut.forget:
                store.add_reference()
        self._cuts.keep(key, cut, int(recipe.cache_gib * 2**30))
        self._compute(cut)
        return cut

    def where(self, recipe: Recipe) -> Where:
        """The layers that a run trains and reads; fits probes for an objective that needs them."""
        needs = needs_of(recipe)
        n = self.checkpoint.n_layers
        if isinstance(needs, Logprobs):
            if needs.twin and not self.data.paired:
                raise unpaired(objective_of(recipe).name)
            # The sources of these objectives train all layers.
            return Where(check_trained(recipe.trained_layers or range(n), n - 1), (LOGPROBS,))
        if needs.probes == "none":
            trained, layer = resolve_layers(recipe.layer, recipe.trained_layers, n)
            return Where(trained, (layer,))
        directions = directions_for(recipe, needs.probes, self.probes(recipe))
        read = tuple(directions)
        # In a shallow model all that can move what is read; else the layers that are read.
        default = read if n > SHALLOW else range(max(read) + 1)
        trained = check_trained(recipe.trained_layers or default, max(read))
        head = (LOGPROBS,) if self._wants_twins(needs) else ()
        return Where(trained, (*head, *read), directions)

    def _wants_twins(self, needs: Needs) -> bool:
        if isinstance(needs, Logprobs):
            return needs.twin
        return needs.twin_logprobs and self.data.paired

    def probes(self, recipe: Recipe) -> tuple[Probe, ...]:
        """Probes of the base's layers, toxic against neutral training texts; fitted once."""
        # What is opened for less would be opened again for training.
        whole = self._wants_twins(needs_of(recipe))
        return self.probing.probes(recipe, whole=whole)

    def known_probes(self, recipe: Recipe) -> tuple[Probe, ...]:
        """The probes behind a recipe's directions; none for an objective that needs none."""
        needs = method_of(recipe).extras.get("needs")
        return self.probes(recipe) if needs is not None and needs.probes != "none" else ()

    def tokens(self, recipe: Recipe) -> Tokens:
        """The training texts as token ids."""
        if recipe.max_tokens not in self._tokens:
            _, tokenizer = self.any_opened(recipe)
            self._tokens[recipe.max_tokens] = Tokens.of(
                self.data, recipe, tokenizer, self.checkpoint.config, self.progress.say
            )
        return self._tokens[recipe.max_tokens]

    @property
    def data_hashes(self) -> dict[str, str]:
        """Source -> hash, by published names."""
        return as_published(self.data.hashes)

    def metadata(self, recipe: Recipe, method: str, facts: dict[str, Any]) -> dict[str, Any]:
        """What an artefact tells of its origin."""
        return {
            "function": recipe.function,
            "objective": method,
            "seed": recipe.seed,
            "base_model": published(recipe.model),
            "recipe": published_recipe(recipe),
            "training": facts,
        }

    def release(self) -> None:
        """Drop the opened base and its boundaries."""
        self._close()
        gc.collect()

    def _close(self) -> None:
        self.drop_cuts()
        self.looks = {}
        self._opened = None

    def drop_cuts(self) -> None:
        """Drop all boundaries, and what looks keep of the layers below."""
        self._cuts.close()
        for look in self.looks.values():
            if look.replay is not None:
                look.replay.clear()

    def since_last(self) -> dict[str, float]:
        """Seconds spent since the last run on this bench; what the two share counts for that."""
        more = [name for name in ("probe", "episodes") if name in self.timing]
        names = ("load", "prefix", *more)
        spent = {name: self.timing.get(name, 0.0) - self._told.get(name, 0.0) for name in names}
        self._told = dict(self.timing)
        return spent

    def any_opened(self, recipe: Recipe) -> tuple[Any, Any]:
        """(model, tokenizer), however deep."""
        opened = self._opened or self.opened(recipe.model, 1)
        return opened.model, opened.tokenizer

    def opened(self, name: str, depth: int | None) -> Opened:
        """The base's first layers, or with None all and the head; opened anew only for more."""
        if not self.has_opened(depth):
            self._close()
            with timed(self.timing, "load"):
                model, tokenizer = self.open_model(name, depth)
                self._opened = Opened(model, tokenizer, find_structure(model), depth is None)
        assert self._opened is not None
        return self._opened

    def has_opened(self, depth: int | None) -> bool:
        """Whether the base is open at least so deep."""
        opened = self._opened
        if opened is None or opened.whole:
            return opened is not None
        return depth is not None and opened.structure.n_layers >= depth

    def adopt(self, opened: Opened) -> None:
        """Work on the base that another side has opened: runs trained together share one model."""
        if self._opened is not opened:
            self.release()
            self._opened = opened

    def check_dtype(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """A delta to weights that were rounded on reading would not belong to those on disk.

        Raises RecipeError where a weight of the model, by its own name, is narrower than its file.
        """
        for own_name, weight in weights.items():
            name = causal_lm_name(model, own_name)
            stored = self.checkpoint.tensors[self.checkpoint.resolve(name)].dtype
            if torch.promote_types(weight.dtype, stored) != weight.dtype:
                raise RecipeError(
                    what="The dtype of the run cannot hold the weights that it would train",
                    got=f"{dtype_name(weight.dtype)}, and {name} stored in {dtype_name(stored)}",
                    allowed=f"{dtype_name(stored)}, or a dtype that holds all its values",
                    fix="set dtype to float32, or save the model in that dtype first",
                )

    def _compute(self, cut: Cut) -> None:
        missing = cut.missing
        if not missing:
            return
        total = sum(store.n_tokens for store in missing)
        with timed(self.timing, "prefix"), self.progress.phase("prefix", total) as advance:
            for store in missing:
                store.compute(advance)

    def patch_of(
        self, recipe: Recipe, weights: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> Patch:
        """The difference of trained weights (name in the opened model -> tensor) to the base's."""
        cut = self.cut(recipe)
        # Disk is the reference: the model in memory may be in a wider type than the base's file.
        # And the model's own weights may be trained ones at this moment.
        before = {cut.names[name]: cut.originals[name] for name in weights}
        after = {cut.names[name]: tensor.detach().cpu() for name, tensor in weights.items()}
        metadata = self.metadata(recipe, objective_of(recipe).name, facts)
        return Patch.between(
            before, after, base=self.checkpoint.base_tensors(after), metadata=metadata
        )


def reads_outputs(recipe: Recipe) -> bool:
    """Whether looks read what the whole model says, which needs all layers and the head."""
    return recipe.tradeoff in EXPLORING and recipe.reward != "representation"
