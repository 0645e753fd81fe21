"""The archive of a trade-off that explored: patches of the points that no other dominates.

Patches lie in ``front/`` of the run's folder, named after the episodes and the steps they are from.
What is kept follows from the points alone, in their order, so that an archive can be rebuilt from
the episodes' records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.errors import PatchError
from expunge.evaluation.pareto import contributions, front
from expunge.files import disk_errors, write_json
from expunge.model.patch import Patch
from expunge.records import ended_of
from expunge.training.watch import Point

# Worth that a look at some hundred items can tell apart: some two standard errors of what is
# forgotten.
CLEARLY = 0.05
FRONT_FOLDER = "front"
FRONT_NAME = "front.json"
# Names of patches in the folder, and of what a killed process leaves beside them, with its number.
_SEEN = r"episode\d{3,}-step\d{4,}"
FRONT_FILE = re.compile(
    rf"{_SEEN}(?:-and-{_SEEN})?(?:-scale\d\.\d)?\.safetensors|episode\d{{3,}}\.losses\.jsonl"
)
FRONT_LEFTOVER = re.compile(rf"\.(?:{FRONT_FILE.pattern})\.(\d+)\.tmp")


@dataclass(frozen=True)
class Entry:
    """A point of the front.

    Attributes:
        episode, step: where it was seen.
        worth: what is forgotten times what is kept, as `Archive.worth` has it.
        chosen: whether it is the run's own patch.
        scale: what the change that was seen there is multiplied by.
        other: (episode, step) of a second change; the entry's is the mean of the two, then scaled.
    """

    episode: int
    step: int
    point: Point
    worth: float
    chosen: bool = False
    scale: float = 1.0
    other: tuple[int, int] | None = None

    @property
    def file(self) -> str:
        """Name of its patch."""
        name = _seen(self.episode, self.step)
        if self.other is not None:
            name += f"-and-{_seen(*self.other)}"
        if self.scale != 1:
            name += f"-scale{self.scale:.1f}"
        return f"{name}.safetensors"

    @property
    def was_seen(self) -> bool:
        """Whether it is a state that training went through, not one made of such."""
        return self.scale == 1 and self.other is None

    @property
    def losses_file(self) -> str:
        """Name of its episode's log, which only whole runs of a search leave."""
        return losses_file(self.episode)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "episode": self.episode,
            "step": self.step,
            "forget": self.point.forget,
            "retain": self.point.retain,
            "worth": self.worth,
            "chosen": self.chosen,
            "scale": self.scale,
            "other": self.other and list(self.other),
            "file": self.file,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Entry:
        """Inverse of `to_dict`."""
        point = Point(raw["forget"], raw["retain"])
        other, scale = raw.get("other"), raw.get("scale", 1.0)  # earlier runs had neither
        names = ("episode", "step", "worth", "chosen")
        own = {name: raw[name] for name in names}
        return cls(point=point, scale=scale, other=other and (other[0], other[1]), **own)


def _seen(episode: int, step: int) -> str:
    return f"episode{episode:03}-step{step:04}"


def losses_file(episode: int) -> str:
    """Name of an episode's log."""
    return f"episode{episode:03}.losses.jsonl"


@dataclass
class Archive:
    """Points and their patches: ``size`` at most, the fallback's, and what is made at the end.

    Attributes:
        folder: of the run.
        floor: retain at and below which a point is worth nothing, and adds no hypervolume.
        make_patch: (weights, facts) -> patch.
        fallback: the episode of which one point is kept apart from the front, and taken only if it
            is worth `CLEARLY` more than what is there.
        entries: by forgetting, ascending.
    """

    folder: Path
    size: int
    floor: float
    make_patch: Callable[[Mapping[str, Tensor], dict[str, Any]], Patch]
    fallback: int | None = None
    entries: list[Entry] = field(default_factory=list)
    _told: list[Entry] = field(default_factory=list)

    def add(
        self, episode: int, step: int, point: Point, weights: Mapping[str, Tensor] | None
    ) -> None:
        """Take a point in if it belongs to the front; points that it dominates go.

        Args:
            weights: name in the opened model -> tensor; None where the patch is there already.
        """
        entry = Entry(episode, step, point, self.worth(point))
        self._told.append(entry)
        self.entries = self._front([*self.entries, entry])
        if weights is not None and entry in self.entries:
            facts = {"episode": episode, "step": step, "point": point._asdict()}
            self.make_patch(weights, facts).save(self.path(entry))

    def worth(self, point: Point) -> float:
        """What a point is worth alone, by which the best is found."""
        return point.worth(self.floor)

    def path(self, entry: Entry) -> Path:
        """Where an entry's patch lies."""
        return self.folder / FRONT_FOLDER / entry.file

    @property
    def best(self) -> Entry:
        """The entry worth most by itself, above the floor or else above none."""
        best = _best(self.entries)
        others = [entry for entry in self.entries if entry.episode != self.fallback]
        if best.episode != self.fallback or not others:
            return best
        other = _best(others)
        return other if other.worth > max(0.0, best.worth - CLEARLY) else best

    def second(self, best: Entry) -> Entry | None:
        """The entry worth most of those from other episodes than this one."""
        others = [entry for entry in self.entries if entry.episode != best.episode]
        return _best(others) if others else None

    def prune(self, before: int | None = None) -> None:
        """Remove the files of points that went; once it is written down that they did.

        Args:
            before: spare the files of this episode and later ones, which may be under way.
        """
        folder = self.folder / FRONT_FOLDER
        wanted = {name for one in self.entries for name in (one.file, one.losses_file)}
        with disk_errors(folder):
            for path in folder.glob("episode*"):
                # A user's own file is none of this archive's.
                own = FRONT_FILE.fullmatch(path.name) and path.name not in wanted
                if own and (before is None or _episode(path) < before):
                    path.unlink()

    def _front(self, entries: list[Entry]) -> list[Entry]:
        """One point of the fallback; of the others, those that none that was told dominates."""
        kept = [*self._kept(entries, True, 1), *self._kept(entries, False, self.size)]
        return sorted(kept, key=lambda entry: entry.point)

    def _kept(self, entries: list[Entry], spare: bool, size: int) -> list[Entry]:
        """Of the fallback's entries (``spare``), or of the others.

        What made room for others still dominates: a point that comes in later has been in the front
        of its own episode too, so that whoever played that has written its patch.
        """
        told = [entry for entry in self._told if (entry.episode == self.fallback) == spare]
        # Points below the floor are worth nothing; they count only while there is no other.
        worthy = [entry for entry in told if entry.worth > 0] or told
        best = {worthy[index] for index in front([entry.point for entry in worthy])}
        kept = sorted(best.intersection(entries), key=lambda entry: entry.point)
        while len(kept) > size:
            shares = contributions([entry.point for entry in kept], self.floor)
            kept.pop(shares.index(min(shares)))
        return kept


def _episode(path: Path) -> int:
    """Number of the episode that a file of the front is from."""
    return int(re.split(r"\D", path.name.removeprefix("episode"), maxsplit=1)[0])


def _best(entries: list[Entry]) -> Entry:
    return max(entries, key=lambda one: (one.worth, one.point.worth(0.0), one.point.forget))


def chosen(entries: list[Entry], place: int) -> list[Entry]:
    """The same entries, with the one at a place as the run's own."""
    return [replace(entry, chosen=index == place) for index, entry in enumerate(entries)]


def chosen_facts(entries: list[Entry]) -> dict[str, Any]:
    """What a patch and a record tell of the chosen entry; ``point`` counts from 1."""
    place = next(index for index, entry in enumerate(entries) if entry.chosen)
    return {"point": place + 1, **entries[place].to_dict()}


def collapse_of(entry: Entry, tried: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """What a record tells of a collapse of a training that an entry is from, the first's first.

    Args:
        tried: of each episode and the last run, in this order, ``ended`` and ``steps``.
    """
    for episode, step in ((entry.episode, entry.step), entry.other or (entry.episode, entry.step)):
        if ended_of(tried, episode) == "collapsed":
            return {"collapsed": tried[episode]["steps"], "restored": step}
    return {"collapsed": None, "restored": None}


def save_front(folder: Path, entries: list[Entry]) -> None:
    """Write ``front.json``, atomically."""
    write_json(folder / FRONT_NAME, [entry.to_dict() for entry in entries])


def load_front(folder: Path) -> list[Entry]:
    """Read ``front.json``. Raises PatchError if a run left no front there."""
    path = folder / FRONT_NAME
    try:
        entries = [Entry.from_dict(raw) for raw in json.loads(path.read_text(encoding="utf-8"))]
        if not entries:
            raise ValueError("no points")
        return entries
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(
            what=f"No front in {folder}",
            got=f"{type(error).__name__}: {error}",
            allowed="the folder of a finished run with a learned trade-off",
            fix="run with --tradeoff learned first",
        ) from error
