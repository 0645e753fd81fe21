"""What the runs were made with: settings that differ, settings they share, where they come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.records import RunRecord
from expunge.report.gather import Source

# The folders of whole paths, which say where things lay on a machine.
_FOLDERS = re.compile(r"(^|[\s:=,(\"'])(?:~[\w.-]*|[A-Za-z]:)?[/\\]{1,2}(?:[^\s/\\:<>]+[/\\])+")


@dataclass(frozen=True)
class Difference:
    """A setting that differs between groups of runs: (group, value) each."""

    name: str
    values: tuple[tuple[str, str], ...]

    def kinds(self) -> dict[str, list[str]]:
        """Value -> the groups that have it."""
        found: dict[str, list[str]] = {}
        for group, value in self.values:
            found.setdefault(value, []).append(group)
        return found


@dataclass(frozen=True)
class Fact:
    """A line of a run's origin, with every value that was met and in how many runs."""

    name: str
    values: tuple[tuple[str, int], ...]


def settings(
    groups: Mapping[str, Sequence[RunRecord]],
) -> tuple[tuple[Difference, ...], tuple[tuple[str, str], ...]]:
    """(those that differ between groups, those that all share); seeds aside."""
    recipes = {name: [_recipe(run) for run in runs] for name, runs in groups.items() if runs}
    names = dict.fromkeys(key for some in recipes.values() for one in some for key in one)
    different, shared = [], []
    for name in names:
        if name == "seed":
            continue
        values = {
            group: " or ".join(dict.fromkeys(said(one.get(name)) for one in some))
            for group, some in recipes.items()
        }
        if len(set(values.values())) > 1:
            different.append(Difference(name, tuple(values.items())))
        else:
            shared.append((name, next(iter(values.values()))))
    return tuple(different), tuple(shared)


def origins(sources: Sequence[Source]) -> tuple[Fact, ...]:
    """Versions, hardware, commit, hashes: one line a fact, all values that were met."""
    lines: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "base model": lambda p: _part(p, "recipe").get("model"),
        "oracle": lambda p: _part(p, "recipe").get("oracle"),
        "commit": lambda p: p.get("commit"),
        "python": lambda p: p.get("python"),
        "packages": lambda p: _list(_part(p, "packages")),
        "hardware": lambda p: _list(_part(p, "hardware")),
        "data, SHA-256": lambda p: _part(p, "data"),
        "scorers": lambda p: _part(p, "scorers"),
        "scorer files, SHA-256": lambda p: _part(p, "scorer_files"),
        "tensors of the base, SHA-256": lambda p: {
            name: _part(_part(p, "base"), name).get("fingerprint") for name in _part(p, "base")
        },
        "notes on the data": lambda p: p.get("notes"),
    }
    found = []
    for name, line in lines.items():
        counts: dict[str, int] = {}
        for source in sources:
            told = line(source.record.provenance)
            for one in _each(told):
                counts[one] = counts.get(one, 0) + 1
        if counts:
            found.append(Fact(name, tuple(counts.items())))
    return tuple(found)


def said(value: Any) -> str:
    """A setting as words; of a whole path the last part alone: pages are given away."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return _list(value) or "none"
    if isinstance(value, list):
        return ", ".join(map(said, value)) or "none"
    return unplaced(str(value))


def unplaced(text: str) -> str:
    """``text`` with each whole path cut to its last part."""
    return _FOLDERS.sub(r"\1", text)


def _recipe(run: RunRecord) -> Mapping[str, Any]:
    return _part(run.provenance, "recipe")


def _part(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = told.get(name)
    return found if isinstance(found, dict) else {}


def _each(told: Any) -> list[str]:
    """The values of one line: each of a list or of an object by itself."""
    if told in (None, "", {}, []):
        return []
    if isinstance(told, dict):
        return [f"{unplaced(str(key))}: {said(value)}" for key, value in told.items()]
    return [said(one) for one in told] if isinstance(told, list) else [said(told)]


def _list(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {said(value)}" for key, value in told.items() if value is not None)
