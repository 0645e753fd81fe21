"""The end of an exploration: the front is looked at closer, a point is taken, facts are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from expunge.errors import DivergedError
from expunge.evaluation.looks import LookKind
from expunge.evaluation.pareto import hypervolume
from expunge.learning import Learning, reads_outputs
from expunge.metalearning.archive import Archive, Entry, chosen_facts
from expunge.metalearning.episodes import Episode
from expunge.metalearning.looking import look_at
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch
from expunge.recipe import Recipe

# Items of each part of the last look at the front's points.
CLOSER = 500


def best_of(episodes: Episodes, archive: Archive) -> Entry:
    """The point to take, once the front has been looked at closer.

    Raises DivergedError if there is none, or if all have lost what is to be kept.
    """
    recipe, progress = episodes.recipe, episodes.learning.progress
    if not archive.entries:
        raise DivergedError(
            what=f"No episode ({recipe.tradeoff}) got as far as a look at validation",
            got=f"{len(episodes.played)} episodes and the runs after them, all of which diverged",
            allowed="at least one that trains",
            fix="lower lr, or look at the data",
        )
    archive.entries = closer(episodes.learning, recipe, archive, episodes.kind)
    best = archive.best
    if best.point.retain < recipe.collapse_floor:
        raise DivergedError(
            what=f"Every state that was found ({recipe.tradeoff}) has lost what is to be kept",
            got=f"retain {best.point.retain:.2f} of the base's at best",
            allowed=f"at least {recipe.collapse_floor:g}",
            fix="lower lr or raise retain_weight: knobs are tried around them",
        )
    if best.worth == 0:
        progress.say(
            f"note: no state both forgets and keeps more than {recipe.retain_floor:g} of the rest; "
            f"the best keeps {best.point.retain:.2f} and is taken. More episodes or steps may help"
        )
    return best


def facts_of(episodes: Episodes, played: list[Episode], entries: list[Entry]) -> dict[str, Any]:
    """What a record tells of a trade-off that explored."""
    recipe = episodes.recipe
    policy = {} if episodes.searches else {"policy": episodes.policy.to_dict()}
    return {
        "kind": recipe.tradeoff,
        "episodes": episodes.count,
        "episode_steps": episodes.steps,
        "inner_steps": sum(one.steps for one in played),
        "reward": episodes.kind,
        "looked_at": {"base": episodes.base, "floor": recipe.retain_floor},
        "knobs": {scale.knob.name: scale.to_dict() for scale in episodes.scales},
        **policy,
        "hypervolume": hypervolume([entry.point for entry in entries], recipe.retain_floor),
        "chosen": chosen_facts(entries),
        "front": [list(entry.point) for entry in entries],
        "tried": [
            {
                "knobs": _first(one.knobs),
                "reward": one.reward,
                "steps": one.steps,
                "ended": one.ended,
            }
            for one in played
        ],
        "seconds": sum(one.seconds for one in played),
    }


def _first(knobs: Sequence[dict[str, float]]) -> dict[str, float]:
    """What an episode began with; a search keeps to it."""
    return knobs[0] if knobs else {}


def closer(learning: Learning, recipe: Recipe, archive: Archive, kind: LookKind) -> list[Entry]:
    """The front, seen again on all of validation: what looked best on a part of it was lucky too.

    What is there is not thrown out, even where another point now dominates it.
    """
    look = look_at(learning, recipe.updated(look_items=CLOSER), kind, check=False)
    model = learning.opened(recipe.model, None if reads_outputs(recipe) else 1).model
    found = []
    with learning.progress.phase("front", len(archive.entries)) as advance:
        for entry in archive.entries:
            with Patch.load(archive.path(entry)).applied(model):
                point = look()
            found.append(replace(entry, point=point, worth=point.worth(recipe.retain_floor)))
            advance(1)
    return sorted(found, key=lambda entry: entry.point)
