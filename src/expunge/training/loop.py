"""The one training loop: plain, resumable, and suspicious of its own success."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import DivergedError, ResourceError, TrainingError
from expunge.model.boundaries import BoundaryStore
from expunge.model.memory import is_out_of_memory
from expunge.model.segment import Segment
from expunge.objectives.base import Activations, Direction, Loss, Needs, Objective
from expunge.objectives.targets import Targets
from expunge.training.balance import NORM, Balance, take_gradients
from expunge.training.checks import check_finite, check_moved, check_varies, is_finite
from expunge.training.log import StepLog, append_step, read_losses, write_losses
from expunge.training.order import Batches
from expunge.training.seen import Sight, share
from expunge.training.settings import TrainingSettings
from expunge.training.state import Optimiser, TrainingState
from expunge.training.tradeoff import Dials, Tradeoff
from expunge.training.watch import Watch

WITH_REFERENCE = Activations(forget_reference=True)
# Steps between looks at what an objective watches besides its loss.
WATCH_EVERY = 5

_TERMS = ("loss", "forget", "retain")


@dataclass(frozen=True)
class TrainingResult:
    """Trained weights (name -> tensor on the CPU, the model's dtype) and what was seen.

    Attributes:
        collapsed: steps done when what is to be kept fell through the floor, which ended the run;
            None for a run that went through.
        restored: of a collapsed run, the number of steps behind the weights: its best state.
    """

    weights: dict[str, Tensor]
    log: tuple[StepLog, ...]
    micro_batch_size: int
    collapsed: int | None = None
    restored: int | None = None


@dataclass(frozen=True)
class Stage:
    """Where a run keeps its unfinished state; None keeps nothing.

    Attributes:
        context: fingerprint of settings, data and base weights; a state of another is refused.
    """

    state: Path | None = None
    losses: Path | None = None
    context: str = ""


@dataclass(frozen=True)
class _Part:
    """What one trainer did at a step: its topic, its dials, its terms and what it watches."""

    topic: int
    dials: Dials
    values: dict[str, float]


class _HalvedError(Exception):
    """The pieces of a step have become smaller: it begins again."""


def _together(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Terms added up; where there are several trainers, those of each beside them: ``2/forget``."""
    if len(parts) == 1:
        return dict(parts[0])
    sums = {name: sum(part[name] for part in parts) for name in _TERMS}
    each = {f"{n}/{name}": part[name] for n, part in enumerate(parts, 1) for name in part}
    return sums | each


class Trainer:
    """One run over prepared boundaries.

    Args:
        segment: the cut model.
        forget: one computed store for each topic; topics alternate by step.
        retain: a computed store that holds the reference.
        objective: a registered objective with its settings bound: ``(forget, retain) -> Loss``.
        tradeoff: weighs the two terms, and sets other knobs.
        settings: of the run.
        needs: what the objective is given; forget stores must hold references that it asks for.
        twins: a computed store of the forget texts' other wordings, index by index; only with one
            topic.
        directions: layer -> what its probe found.
        watch: looks at validation on the way; None: no looks.
        beside: trainers over other segments of the same model. Their gradients are added at each
            step, each by its own objective, batches and trade-off; steps, learning rate and the
            rest of the optimiser are this trainer's, and the looks too. All segments must have
            the same first trained layer, or boundaries would go stale.
        balance: whether gradients of trainers beside each other are brought to one size first;
            false: the plain sum of the losses.
    """

    def __init__(
        self,
        segment: Segment,
        forget: Sequence[BoundaryStore],
        retain: BoundaryStore,
        *,
        objective: Objective,
        tradeoff: Tradeoff,
        settings: TrainingSettings,
        needs: Needs = WITH_REFERENCE,
        twins: BoundaryStore | None = None,
        directions: Mapping[int, Direction] | None = None,
        watch: Watch | None = None,
        beside: Sequence[Trainer] = (),
        balance: bool = True,
    ) -> None:
        assert all(one.segment.model is segment.model for one in beside)
        assert all(one.segment.first == segment.first for one in beside)
        self.watch, self.beside = watch, tuple(beside)
        self._balance = Balance(1 + len(beside)) if beside and balance else None
        self.segment: Segment = segment
        self.forget, self.retain = forget, retain
        self.objective, self.tradeoff, self.settings = objective, tradeoff, settings
        self.sight = Sight(
            segment,
            forget,
            retain,
            needs,
            Targets(settings.target, settings.seed, segment.structure.hidden_size),
            settings.first_token,
            settings.rna_noise,
            twins,
            directions or {},
        )
        self.micro_batch_size = settings.micro_batch_size
        self.batches = Batches(
            [store.lengths for store in forget], retain.lengths, settings.batch_size, settings.seed
        )

    def run(
        self,
        stage: Stage = Stage(),
        on_step: Callable[[StepLog], None] = lambda _log: None,
    ) -> TrainingResult:
        """Train, or go on where a saved state of the same run stopped.

        The model holds its original weights again when this returns or raises.

        Raises:
            TrainingError: loss or gradient is not finite (the last good state is kept), no weight
                changed, or the loss is constant.
            ResourceError: out of memory with a single text at a time.
        """
        with self.segment.training([one.segment for one in self.beside]) as weights:
            optimiser = Optimiser(
                weights,
                weight_decay=self.settings.weight_decay,
                master=self.settings.master_weights,
            )
            originals = {name: p.detach().clone() for name, p in weights.items()}
            log = self._resume(stage, optimiser)
            save = partial(self._save, stage, optimiser, log)
            try:
                for step in range(len(log), self.settings.steps):
                    if self.watch is not None and self.watch.collapsed is not None:
                        break
                    entry = self._looked(self._step(step, optimiser), weights)
                    log.append(entry)
                    append_step(stage.losses, entry)
                    if step == 0:
                        check_moved(originals, weights, lr=self.settings.lr)
                    if (step + 1) % self.settings.save_every == 0:
                        save()
                    on_step(entry)
            except (KeyboardInterrupt, TrainingError):
                # Inside an update the weights belong to no step: the last saved state stays.
                if optimiser.steps == len(log):
                    save()
                raise
            watch = self.watch
            collapsed = watch.collapsed if watch is not None else None
            if watch is not None and collapsed is not None and watch.keep_best:
                watch.restore(weights)
            check_finite(weights)
            save()
            check_moved(originals, weights, lr=self.settings.lr)
            check_varies([entry.loss for entry in log])
            trained = {name: p.detach().cpu().clone() for name, p in weights.items()}
        restored = watch.best_step if watch is not None and collapsed is not None else None
        return TrainingResult(trained, tuple(log), self.micro_batch_size, collapsed, restored)

    def _looked(self, entry: StepLog, weights: Mapping[str, Tensor]) -> StepLog:
        """The entry, with the point that a look after its step saw."""
        if self.watch is None:
            return entry
        point = self.watch.after(entry.step + 1, self.settings.steps, weights)
        return entry if point is None else replace(entry, point=(point.forget, point.retain))

    def _step(self, step: int, optimiser: Optimiser) -> StepLog:
        start = time.perf_counter()
        parts = self._gradients(step, optimiser)
        norm = optimiser.gradient_norm()
        values = _together([part.values for part in parts])
        if not all(map(math.isfinite, (norm, *values.values()))):
            raise DivergedError(
                what=f"The loss or its gradient is not finite at step {step}",
                got=f"loss {values['loss']}, gradient norm {norm}",
                allowed="finite numbers",
                fix="lower lr; the state before this step is kept in the run's folder",
            )
        topic, dials = parts[0].topic, parts[0].dials
        optimiser.step(self._lr(step, dials))
        loss, forgotten, kept = (values.pop(key) for key in _TERMS)
        seconds = time.perf_counter() - start
        return StepLog(
            step,
            topic,
            loss=loss,
            forget=forgotten,
            retain=kept,
            gradient_norm=norm,
            seconds=seconds,
            logs=values,
            knobs=dict(dials.knobs),
        )

    def _gradients(self, step: int, optimiser: Optimiser) -> list[_Part]:
        """Gradients of one step, of this trainer and of those beside it, added up."""
        while True:
            optimiser.zero_grad()
            try:
                if self._balance is not None:
                    return self._balanced(step, optimiser, self._balance)
                return [one._add_gradients(step) for one in (self, *self.beside)]
            except _HalvedError:
                continue

    def _balanced(self, step: int, optimiser: Optimiser, balance: Balance) -> list[_Part]:
        parts, gradients = [], []
        for one in (self, *self.beside):
            part = one._add_gradients(step)
            part.values[NORM] = optimiser.gradient_norm()
            gradients.append(take_gradients(optimiser.weights))
            parts.append(part)
        total = balance.add_up(gradients, [part.values[NORM] for part in parts])
        for name, gradient in total.items():
            optimiser.weights[name].grad = gradient
        return parts

    def _add_gradients(self, step: int) -> _Part:
        """Add this trainer's gradients of one step. Raises _HalvedError where memory ran out."""
        topic, forget, retain = self.batches.at(step)
        if step == 0:
            self.sight.remember_norms(topic, forget)
        points = self.watch.points if self.watch is not None else {}
        dials = self.tradeoff.at(step, self.settings.run_steps, points)
        try:
            return _Part(topic, dials, self._accumulate(step, topic, forget, retain, dials))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(error, len(forget), len(retain))
        raise _HalvedError

    def _watched(self, step: int) -> bool:
        return step % WATCH_EVERY == 0 or step + 1 == self.settings.steps

    def _lr(self, step: int, dials: Dials) -> float:
        lr = self.settings.lr if dials.lr is None else dials.lr
        if self.settings.lr_schedule == "constant":
            return lr
        return lr * (1 - step / self.settings.run_steps)

    def _accumulate(
        self,
        step: int,
        topic: int,
        forget: Sequence[int],
        retain: Sequence[int],
        dials: Dials,
    ) -> dict[str, float]:
        """Forward and backward of one step, in pieces that together weigh as the whole batch."""
        pieces = self._pieces(len(forget), len(retain))
        noise = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        totals: dict[str, float] = {}
        for piece in range(pieces):
            forget_part, retain_part = self.sight.of(
                topic,
                share(forget, piece, pieces),
                share(retain, piece, pieces),
                noise,
                whole=forget,
            )
            loss: Loss = self.objective(forget_part, retain_part, **dials.settings)
            forget_share = self.sight.forget_share(forget_part, topic, forget)
            retain_share = int(retain_part.mask_BT.sum()) / self.sight.count(None, retain)
            total = loss.total(
                forget_weight=dials.forget * forget_share,
                retain_weight=dials.retain * retain_share,
            )
            total.backward()  # type: ignore[no-untyped-call]
            found = {"loss": total, "forget": loss.forget * forget_share}
            found["retain"] = loss.retain * retain_share
            found |= {
                key: value * (retain_share if key.endswith("retain") else forget_share)
                for key, value in (loss.logs.items() if self._watched(step) else ())
            }
            for key, value in found.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach())
        return totals

    def _pieces(self, n_forget: int, n_retain: int) -> int:
        """In how many pieces a step is computed; each holds a text of either side."""
        larger = max(n_forget, n_retain)
        return min(-(-larger // (self.micro_batch_size or larger)), n_forget, n_retain)

    def _halve(self, error: BaseException, n_forget: int, n_retain: int) -> None:
        pieces = self._pieces(n_forget, n_retain)
        if pieces == min(n_forget, n_retain):
            f, r = -(-n_forget // pieces), -(-n_retain // pieces)
            alone = f == r == 1
            texts = "a single text" if alone else f"{f} forget and {r} retain texts"
            raise ResourceError(
                what=f"Out of memory in a training step, with {texts} at a time",
                got=str(error).splitlines()[0] if str(error) else type(error).__name__,
                allowed="texts that fit; each piece of a step holds forget and retain texts",
                fix=f"lower max_tokens{'' if alone else ' or batch_size'}, use dtype bfloat16, "
                "or a machine with more memory",
            ) from error
        self.micro_batch_size = (self.micro_batch_size or self.settings.batch_size) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save(self, stage: Stage, optimiser: Optimiser, log: Sequence[StepLog]) -> None:
        # The log first, whole: it may be ahead of the state, never behind.
        if stage.losses is not None:
            write_losses(stage.losses, log)
        # A loss tells of a broken update one step late: what is saved must be worth going on with.
        if stage.state is not None and is_finite(optimiser.weights):
            TrainingState(
                step=len(log),
                weights=optimiser.weights,
                optimiser=optimiser.tensors(),
                first_norm=self.sight.first_norm,
                micro_batch_size=self.micro_batch_size,
                context=stage.context,
                beside=[(one.sight.first_norm, one.micro_batch_size) for one in self.beside],
                best=self.watch.best if self.watch is not None else {},
            ).save(stage.state)

    @torch.no_grad()
    def _resume(self, stage: Stage, optimiser: Optimiser) -> list[StepLog]:
        """Restore the saved state, if any; returns the log up to it."""
        if stage.state is None or not stage.state.exists():
            if stage.losses is not None:
                stage.losses.unlink(missing_ok=True)
            return []
        state = TrainingState.load(stage.state)
        if state.context != stage.context:
            raise TrainingError(
                what="The unfinished run started from other data, another base or versions",
                got=f"a state of {state.context[:12] or 'unknown origin'}",
                allowed=f"a state of {stage.context[:12]}",
                fix="put files and versions back as they were, or start again with --fresh",
            )
        for name, parameter in optimiser.weights.items():
            parameter.copy_(state.weights[name])
        optimiser.restore(state.optimiser, steps=state.step)
        self.sight.first_norm = dict(state.first_norm)
        self.micro_batch_size = state.micro_batch_size
        for one, (first_norm, micro_batch_size) in zip(self.beside, state.beside, strict=True):
            one.sight.first_norm, one.micro_batch_size = dict(first_norm), micro_batch_size
        log = read_losses(stage.losses)[: state.step] if stage.losses is not None else []
        if len(log) < state.step:
            raise TrainingError(
                what="The log of this run is shorter than its saved state",
                got=f"{len(log)} lines in losses.jsonl, state after {state.step} steps",
                allowed="a line for each step done",
                fix="start again with --fresh",
            )
        if stage.losses is not None:
            write_losses(stage.losses, log)
        if self.watch is not None:
            self.watch.resume(log, state.best)
        if self._balance is not None:
            self._balance.resume(log)
        return log
