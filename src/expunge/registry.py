"""One registry for each kind of part: objectives, edits and functions.

Registering is decorating, and a name, a source and the deviations from it are mandatory. A third
party's package adds a part by the entry point group ``expunge.<kind>s`` whose value is a module;
importing that module runs its decorators.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from expunge.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered part: what it is, where it comes from, how it departs from there."""

    name: str
    part: T
    source: str
    deviations: str
    extras: dict[str, Any]
    kind: str


class Registry(Generic[T]):
    """Names to parts of one kind.

    Args:
        kind: the singular noun used in messages and in the entry point group.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._loaded_plugins = False
        self._broken_plugins: dict[str, str] = {}

    def register(
        self, name: str, *, source: str, deviations: str, **extras: Any
    ) -> Callable[[T], T]:
        """Decorator. Raises ValueError for an empty source or deviations, or a name twice."""
        if not source.strip() or not deviations.strip():
            raise ValueError(f"{self.kind} {name!r} needs a source and its deviations (or 'none')")

        def add(part: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, part, source, deviations, extras, self.kind)
            return part

        return add

    def get(self, name: str) -> Entry[T]:
        """The entry of that name. Raises RecipeError with the nearest known name."""
        self._load_plugins()
        if name not in self._entries:
            broken = "".join(f"; plugin {k} failed: {v}" for k, v in self._broken_plugins.items())
            raise RecipeError(
                what=f"Unknown {self.kind}",
                got=repr(name) + broken,
                allowed=", ".join(sorted(self._entries)),
                fix=nearest(name, self._entries),
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load_plugins()
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        self._load_plugins()
        return name in self._entries

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(entry.name for entry in self)

    def _load_plugins(self) -> None:
        if not self._loaded_plugins:
            self._loaded_plugins = True
            for point in entry_points(group=f"expunge.{self.kind}s"):
                try:
                    point.load()
                # Another's code may raise anything; it is told when a part is missed.
                except Exception as error:  # noqa: BLE001
                    self._broken_plugins[point.name] = f"{type(error).__name__}: {error}"


def nearest(name: str, known: Any) -> str:
    """A sentence that proposes the known name closest to ``name``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else "use one of the names listed above"


def settings_of(entry: Entry[Callable[..., Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """A part's keyword settings with defaults filled in.

    Raises:
        RecipeError: a key that the part does not have, with the nearest one, or a value of the
            wrong kind.
    """
    parameters = inspect.signature(entry.part).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key, value in given.items():
        if key not in defaults:
            raise RecipeError(
                what=f"{entry.kind.capitalize()} {entry.name} has no setting of that name",
                got=repr(key),
                allowed=", ".join(defaults) or "no settings",
                fix=nearest(key, defaults) if defaults else "leave objective_settings out",
            )
        wanted = type(defaults[key])
        # A whole number will do for a float; bool, which Python calls an int, is no number here.
        kinds = (int, float) if wanted is float else wanted
        if isinstance(value, bool) is not (wanted is bool) or not isinstance(value, kinds):
            raise RecipeError(
                what=f"Setting {key} of {entry.kind} {entry.name} is of the wrong kind",
                got=f"{value!r} ({type(value).__name__})",
                allowed=f"{wanted.__name__}, for example {defaults[key]!r}",
                fix=f"set objective_settings.{key} to a {wanted.__name__}",
            )
    return {**defaults, **given}
