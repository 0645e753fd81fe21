"""The end of an exploration: the front is looked at closer, a point is taken, facts are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from expunge.errors import DivergedError
from expunge.evaluation.pareto import hypervolume
from expunge.learning import reads_outputs
from expunge.metalearning.archive import Archive, Entry, chosen_facts
from expunge.metalearning.episodes import Episode
from expunge.metalearning.looking import look_at
from expunge.metalearning.playing import Episodes
from expunge.model.patch import Patch

# Items of each part, and texts, in a look at the front's points; other looks never have more.
CLOSER, CLOSER_TEXTS = 256, 128
# Looks that scaling the best change, and its mean with another, takes: a count from the miniature.
SCALE_LOOKS = 9
# Steps between the scales that the best point's change is tried at, and how far they go.
SCALE_STEP = 0.1
SCALES = (0.5, 1.5)


def best_of(episodes: Episodes, archive: Archive) -> tuple[Entry, int]:
    """The point to take, once the front has been looked at closer; and how many looks that took.

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
    looks = settle(episodes, archive)
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
    return best, looks


def settle(episodes: Episodes, archive: Archive) -> int:
    """Look at the front closer, and for something better than the best of it; the number of looks.

    Means of weights that were trained apart are often better than either (model soups,
    arXiv:2203.05482); here the mean of two changes kept more of the rest at equal forgetting
    (LOG.md). And a change can be weighed after training too: the scaling coefficient of task
    arithmetic (arXiv:2212.04089), chosen on validation as there.
    """
    learning, recipe = episodes.learning, episodes.recipe
    closer = recipe.updated(look_items=max(CLOSER, recipe.look_items))
    most_texts = max(CLOSER_TEXTS, recipe.look_items)
    look = look_at(learning, closer, episodes.kind, check=False, most_texts=most_texts)
    model = learning.opened(recipe.model, None if reads_outputs(recipe) else 1).model

    def seen(patch: Patch, entry: Entry, scale: float = 1.0) -> Entry:
        """An entry as its patch looks, times ``scale``."""
        with patch.applied(model, scale):
            point = look()
        return replace(entry, point=point, worth=archive.worth(point), scale=scale)

    # What looked best on a part of validation was lucky too. Where another point now dominates one
    # that is there, it stays nevertheless.
    front = list(archive.entries)
    with learning.progress.phase("front", len(front)) as advance:
        archive.entries = []
        for entry in front:
            archive.entries.append(seen(Patch.load(archive.path(entry)), entry))
            advance(1)
    best = archive.best
    patch, second = Patch.load(archive.path(best)), archive.second(best)
    facts = patch.metadata
    with learning.progress.phase("scales", 1 if second is None else 2) as advance:
        found, looks = rescaled(best, partial(seen, patch, best))
        advance(1)
        if second is not None:
            mean = (patch + Patch.load(archive.path(second))) * 0.5
            start = seen(mean, replace(best, other=(second.episode, second.step)))
            other, more = rescaled(start, partial(seen, mean, start))
            looks += 1 + more
            if other.worth > found.worth:
                found, patch = other, mean
            advance(1)
    if not found.was_seen:
        told = {"point": found.point._asdict(), "scale": found.scale, "other": found.other}
        training = {**facts["training"], **told}
        made = replace(patch * found.scale, metadata={**facts, "training": training})
        made.save(archive.path(found))
        archive.entries.append(found)
    archive.entries.sort(key=lambda entry: entry.point)
    return len(front) + looks


def rescaled(entry: Entry, seen: Callable[[float], Entry]) -> tuple[Entry, int]:
    """The entry at the scale where it is worth most, found by single steps; how many looks it took.

    Of one that is worth nothing, smaller scales alone are tried: the rest may be kept there.

    Args:
        seen: scale -> the entry as it looks there.
    """
    best, looks = entry, 0
    for step in (SCALE_STEP, -SCALE_STEP) if entry.worth > 0 else (-SCALE_STEP,):
        scale = round(1 + step, 1)
        while SCALES[0] <= scale <= SCALES[1]:
            found, looks = seen(scale), looks + 1
            if best.worth > 0 and found.worth <= best.worth:
                break
            best = found if found.worth > best.worth else best
            scale = round(scale + step, 1)
        if best is not entry:
            break
    return best, looks


def facts_of(
    episodes: Episodes, played: list[Episode], entries: list[Entry], workers: int
) -> dict[str, Any]:
    """What a record tells of a trade-off that explored, with so many processes at a time."""
    recipe = episodes.recipe
    policy = {} if episodes.searches else {"policy": episodes.policy.to_dict()}
    return {
        "kind": recipe.tradeoff,
        "episodes": episodes.count,
        "workers": workers,
        "episode_steps": episodes.steps,
        "action_steps": episodes.action_steps,
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
