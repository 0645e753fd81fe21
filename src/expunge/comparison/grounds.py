"""What cells were measured on and how they were made: which compare, what a reader must know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from expunge.comparison.cells import Cell, Place, recipe_of
from expunge.comparison.matrix import Row
from expunge.records import RunRecord, ended_of

# Settings that decide which examples there are and how they are scored.
MEASURING = (
    "validation_share held_back_share max_tokens measure_on scorers samples new_tokens "
    "sampling_seed temperature max_prompts on_overlap"
).split()

# Budgets that differ by less are equal: episodes come in whole numbers.
ALIKE = 0.1


def grounds(record: RunRecord) -> str:
    """Equal for records whose results compare: same base, data files by content, measuring."""
    recipe = recipe_of(record)
    data = dict(record.provenance.get("data") or {})
    # Twins of training texts: nothing is measured on them.
    data.pop(str(recipe.get("refusals")), None)
    facts = {
        "model": PurePath(str(recipe.get("model", ""))).name,
        "data": sorted(json.dumps(one, sort_keys=True) for one in data.values()),
        # Scorers are named by files that may lie elsewhere; their content is hashed.
        **{name: recipe.get(name) for name in MEASURING if name != "scorers"},
        "scorers": [PurePath(str(one)).name for one in recipe.get("scorers", ())],
        "scorer files": sorted((record.provenance.get("scorer_files") or {}).values()),
    }
    return json.dumps(facts, sort_keys=True)


def differing(one: str, other: str) -> list[str]:
    """Names of what differs between two grounds."""
    first, second = json.loads(one), json.loads(other)
    return [name for name in first if first[name] != second.get(name)]


def grounds_of(cells: Iterable[Cell]) -> list[str]:
    """The grounds among measured cells, each once."""
    found = [grounds(cell.record) for cell in cells if cell.record is not None]
    return list(dict.fromkeys(found))


def notes_of(rows: Sequence[Row], unfilled: Mapping[Place, str]) -> list[str]:
    """Everything a reader of these rows must know.

    Args:
        unfilled: what was said to have diverged though there is a record.
    """
    notes = [
        f"{place}: said to have diverged ({why}), but it has a record, which counts"
        for place, why in unfilled.items()
    ]
    for row in rows:
        notes += _of_row(row)
    for function in dict.fromkeys(row.function for row in rows):
        own = [row for row in rows if row.function == function]
        notes += _of_data(function, own)
        notes += _of_budget(function, own)
    return notes


def _of_row(row: Row) -> list[str]:
    """Of its cells, of what its seeds share, and of how its runs went."""
    return [*_of_cells(row), *_of_recipes(row), *_of_runs(row)]


def _of_cells(row: Row) -> list[str]:
    name = f"{row.method} on {row.function}"
    notes = []
    for cell in row.cells:
        if cell.status == "missing":
            notes.append(f"{cell.place}: missing: {cell.reason}")
        elif cell.status == "diverged":
            notes.append(f"{cell.place}: diverged, counted as forget 0, retain 0: {cell.reason}")
    lacking: dict[tuple[str, str], int] = {}
    for cell in row.cells:
        if cell.status == "measured":
            for part, why in cell.lacking.items():
                lacking[part, why] = lacking.get((part, why), 0) + 1
    for (part, why), count in lacking.items():
        notes.append(f"{name}: {part} is missing with {_seeds(count)}: {why}")
    if len(row.counted) == 1:
        notes.append(f"{name}: one seed only: says nothing about others")
    if any(cell.status == "measured" and not cell.by_example for cell in row.cells):
        notes.append(f"{name}: records without values example by example: no test over examples")
    return notes


def _of_recipes(row: Row) -> list[str]:
    name = f"{row.method} on {row.function}"
    notes = []
    recipes = [recipe_of(cell.record) for cell in row.cells if cell.record is not None]
    mixed = sorted(
        key
        for key in {key for recipe in recipes for key in recipe} - {"seed", "measure_probes"}
        if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in recipes}) > 1
    )
    if mixed:
        notes.append(f"{name}: the recipes of its seeds differ in {', '.join(mixed)}")
    splits = {str(recipe.get("measure_on", "test")) for recipe in recipes} - {"test"}
    if splits:
        notes.append(f"{name}: measured on {', '.join(splits)}, which served for choices")
    return notes


def _of_runs(row: Row) -> list[str]:
    name = f"{row.method} on {row.function}"
    notes = []
    reread = [cell.place.seed for cell in row.cells if cell.spent.get("test_reads", 0) > 1]
    for how, told in (
        ("collapsed", "what was to be kept collapsed"),
        ("diverged", "training diverged after a look at validation"),
    ):
        seeds = [c.place.seed for c in row.cells if c.record and _ended(c.record) == how]
        if seeds:
            notes.append(f"{name}: {told} with seed {_list(seeds)}; the best state before counts")
    if row.removed != row.function:
        notes.append(
            f"{name}: patches for {row.removed}; what they were meant to remove counts as lost "
            f"where {row.function}'s retain data ask for it"
        )
    if reread:
        notes.append(f"{name}: the test split was read more than once with seed {_list(reread)}")
    return notes


def _ended(record: RunRecord) -> str:
    """How the training behind a run's patch ended: ``whole``, ``collapsed`` or ``diverged``."""
    explored = record.training.get("tradeoff") or {}
    tried, at = explored.get("tried") or [], (explored.get("chosen") or {}).get("episode")
    ended = ended_of(tried, at) if isinstance(at, int) else None
    return ended or ("collapsed" if record.training.get("collapsed") else "whole")


def _of_data(function: str, rows: Sequence[Row]) -> list[str]:
    by_ground: dict[str, list[str]] = {}
    for row in rows:
        for ground in grounds_of(row.cells):
            by_ground.setdefault(ground, []).append(row.method)
    if len(by_ground) < 2:
        return []
    first, *others = by_ground
    keys = list(dict.fromkeys(key for other in others for key in differing(first, other)))
    groups = "; ".join(", ".join(methods) for methods in by_ground.values())
    return [
        f"{function}: measured on unlike grounds ({', '.join(keys)}): {groups}. "
        "Tests between them are refused"
    ]


def _of_budget(function: str, rows: Sequence[Row]) -> list[str]:
    notes = []
    for name, words in (("inner_steps", "steps of training"), ("looks", "looks at validation")):
        # What trains nothing, or never looks, has no budget to be equal.
        spent = {row.method: total for row in rows if (total := row.total(name))}
        if spent and max(spent.values()) > (1 + ALIKE) * min(spent.values()):
            told = ", ".join(f"{method} {total}" for method, total in spent.items())
            notes.append(f"{function}: unequal budgets, {words} with all seeds: {told}")
    return notes


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))
