"""Joint training: the gradients of several recipes' losses add up on the weights of one model.

They are brought to one size first (`expunge.training.balance`), or added up as they are.

Each recipe keeps its objective, data, batches, seed and retain weight. Steps, learning rate and the
rest of the optimiser are the first recipe's. Each step costs what the recipes' steps cost together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.cuts import Where, depth_of
from expunge.folder import LOSSES_NAME, PATCH_NAME, STATE_NAME, holds, unclaiming
from expunge.interference import folder
from expunge.learning import Learning, objective_of
from expunge.metalearning.looking import guard
from expunge.model.patch import Patch
from expunge.model.segment import LOGPROBS
from expunge.objectives.base import Activations
from expunge.progress import Progress, Silent
from expunge.published import as_published
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.run import looks_of
from expunge.training.loop import Stage, TrainingResult
from expunge.training.tradeoff import rule
from expunge.training.watch import Point, Watch
from expunge.workbench import Workbench


def joint(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    progress: Progress | None = None,
    benches: Sequence[Workbench] | None = None,
    balance: bool = True,
    fresh: bool = False,
) -> RunRecord:
    """Train several recipes of one base at once, or go on where that was interrupted.

    Leaves ``recipes.yaml``, ``losses.jsonl``, ``patch.safetensors`` and ``record.json`` in ``out``.
    The record has no scores: `expunge.compose.compose` measures the patch as one function or
    another is measured.

    Args:
        recipes: two or more; the first gives steps, learning rate and weight decay.
        out: its folder.
        progress: told what is going on; default: silent.
        benches: one for each of `joint_recipes`, shared with other runs.
        balance: bring the losses' gradients to one size; false: the plain sum of the losses, where
            the one with the larger numbers may take all.
        fresh: discard what ``out`` holds.

    Raises:
        RecipeError: fewer than two recipes, different bases, an edit, a learned trade-off.
        DataError: ``out`` holds something else.
        ExpungeError: other kinds, from the parts.
    """
    progress = progress or Silent()
    how: folder.How = "joint" if balance else "joint-sum"
    folder.check_recipes(how, recipes)
    recipes = joint_recipes(recipes)
    finished = folder.found(how, recipes, out, progress=progress, fresh=fresh)
    if finished is not None:
        return finished
    benches = benches or [Workbench(one, progress, spill_directory=out) for one in recipes]
    for bench, recipe in zip(benches, recipes, strict=True):
        bench.check(recipe)
    folder.claim(how, recipes, out, fresh=fresh)
    if not holds(out, PATCH_NAME):
        with unclaiming(out):
            patch = _trained(how, recipes, out, benches, progress)
        patch.save(out / PATCH_NAME)
    return folder.finish(recipes, out)


def joint_recipes(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """The recipes as they are trained together: all for as many steps as the first."""
    first, *others = recipes
    return (first, *(one.updated(steps=first.steps) for one in others))


def trained_together(wheres: Sequence[Where], n_layers: int) -> list[tuple[int, ...]]:
    """The layers that each recipe's segment trains: all that any recipe trains and it can reach.

    What crosses a cut is computed once, so no recipe may train below another's cut.
    """
    union = sorted({layer for where in wheres for layer in where.trained})
    reach = [max((*_layers_read(where), -1)) for where in wheres]
    # Log-probabilities alone are read above the last layer.
    deepest = [layer if layer >= 0 else n_layers - 1 for layer in reach]
    return [tuple(layer for layer in union if layer <= end) for end in deepest]


@dataclass(frozen=True)
class WorstLook:
    """Looks of several recipes as one: the least that any has forgotten, and has kept."""

    looks: tuple[Callable[[], Point], ...]

    def __call__(self) -> Point:
        points = [look() for look in self.looks]
        return Point(min(p.forget for p in points), min(p.retain for p in points))


def _trained(
    how: folder.How,
    recipes: Sequence[Recipe],
    out: Path,
    benches: Sequence[Workbench],
    progress: Progress,
) -> Patch:
    settled = [bench.settled(one, out) for bench, one in zip(benches, recipes, strict=True)]
    learnings = [bench.learning for bench in benches]
    widened = _widened(learnings, [one for one, _ in settled])
    _share_base(learnings, widened)
    pairs = list(zip(learnings, widened, strict=True))
    usual = [learning.usual(one) for learning, one in pairs]
    rules = [
        rule(r.tradeoff, float(u["retain_weight"])) for r, u in zip(widened, usual, strict=True)
    ]
    watch = _guard(pairs)
    steps = recipes[0].steps
    beside = [
        learning.trainer(one, weighing, None)
        for (learning, one), weighing in zip(pairs[1:], rules[1:], strict=True)
    ]
    trainer = learnings[0].trainer(
        widened[0], rules[0], watch, beside=beside, balance=how == "joint"
    )
    stage = Stage(out / STATE_NAME, out / LOSSES_NAME, _context(benches, widened))
    with progress.phase("train", steps) as advance:
        result = trainer.run(stage, lambda log: advance(1, f"loss {log.loss:.4f}"))
    if watch is not None:
        watch.tell_collapse(progress.say)
    looks = len(watch.points) if watch is not None else 0
    facts = {
        **_facts(pairs, usual, result),
        "looks": looks + sum(looks_of(found) for _, found in settled),
        "settled": [found for _, found in settled],
    }
    return _patch(how, pairs, recipes, result, facts)


def _widened(learnings: Sequence[Learning], recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes with the layers of `trained_together`, and what they read held fast."""
    wheres = [learning.where(one) for learning, one in zip(learnings, recipes, strict=True)]
    trained = trained_together(wheres, learnings[0].checkpoint.n_layers)
    found = []
    for recipe, where, layers in zip(recipes, wheres, trained, strict=True):
        needs = objective_of(recipe).extras["needs"]
        reads_a_layer = isinstance(needs, Activations) and needs.probes == "none"
        layer = max(where.captured) if reads_a_layer else recipe.layer
        found.append(recipe.updated(trained_layers=layers, layer=layer))
    return found


def _share_base(learnings: Sequence[Learning], recipes: Sequence[Recipe]) -> None:
    """Open the base once, as deep as any recipe needs it."""
    wheres = [learning.where(one) for learning, one in zip(learnings, recipes, strict=True)]
    depths = [depth_of(where.captured) for where in wheres]
    depth = None if None in depths else max(d for d in depths if d is not None)
    host = next((one for one in learnings if one.has_opened(depth)), learnings[0])
    for learning in learnings:
        if learning is not host:
            learning.release()
    opened = host.opened(recipes[0].model, depth)
    for learning in learnings:
        learning.adopt(opened)


def _guard(pairs: Sequence[tuple[Learning, Recipe]]) -> Watch | None:
    """One guard for all: it stops the run where the rest is lost for any of them."""
    found = [watch for learning, one in pairs if (watch := guard(learning, one)) is not None]
    if not found:
        return None
    return Watch(
        WorstLook(tuple(watch.look for watch in found)),
        min(watch.every for watch in found),
        max(watch.floor for watch in found),
        retain_floor=max(recipe.retain_floor for _, recipe in pairs),
    )


def _context(benches: Sequence[Workbench], recipes: Sequence[Recipe]) -> str:
    parts = [bench.context(one) for bench, one in zip(benches, recipes, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _facts(
    pairs: Sequence[tuple[Learning, Recipe]],
    usual: Sequence[dict[str, Any]],
    result: TrainingResult,
) -> dict[str, Any]:
    each = []
    for (learning, recipe), used in zip(pairs, usual, strict=True):
        cut, where = learning.cut(recipe), learning.where(recipe)
        each.append(
            {
                "function": recipe.function,
                "objective": objective_of(recipe).name,
                "seed": recipe.seed,
                "read_layers": _layers_read(where),
                "trained_layers": list(where.trained),
                "retain_weight": used["retain_weight"],
                "n_forget_texts": sum(len(store.texts) for store in cut.forget),
                "n_retain_texts": len(cut.retain.texts),
            }
        )
    own = {id(learning): learning for learning, _ in pairs}.values()
    log = result.log
    timing = [*(learning.since_last() for learning in own)]
    return {
        "data": as_published({k: v for one in own for k, v in one.data.hashes.items()}),
        "timing": folder.add_up([*timing, {"train": sum(entry.seconds for entry in log)}]),
        "each": each,
        "lr": usual[0]["lr"],
        "steps": len(log),
        "first_loss": log[0].loss,
        "last": asdict(log[-1]),
        "micro_batch_size": result.micro_batch_size,
        "collapsed": result.collapsed,
        "restored": result.restored,
    }


def _patch(
    how: folder.How,
    pairs: Sequence[tuple[Learning, Recipe]],
    recipes: Sequence[Recipe],
    result: TrainingResult,
    facts: dict[str, Any],
) -> Patch:
    """What all recipes' weights together have become, against the base's files."""
    cuts = [learning.cut(one) for learning, one in pairs]
    names = {own: name for cut in cuts for own, name in cut.names.items()}
    originals = {own: weight for cut in cuts for own, weight in cut.originals.items()}
    before = {names[own]: originals[own] for own in result.weights}
    after = {names[own]: weight for own, weight in result.weights.items()}
    method = f"{how}({', '.join(objective_of(one).name for one in recipes)})"
    return Patch.between(
        before,
        after,
        base=pairs[0][0].checkpoint.base_tensors(after),
        metadata=folder.metadata(recipes, method, facts),
    )


def _layers_read(where: Where) -> list[int]:
    return [layer for layer in where.captured if layer != LOGPROBS]
