"""A figure of a learned trade-off, from its folder alone. Needs matplotlib (extra ``figures``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.drawing import drawn
from expunge.errors import DataError
from expunge.evaluation.pareto import front
from expunge.metalearning.archive import Entry, load_front
from expunge.metalearning.episodes import EPISODES_NAME, Episode
from expunge.records import RunRecord
from expunge.training.watch import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, VERMILLION, SKY = "#0072B2", "#D55E00", "#56B4E9"
KNOB_COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00")
GREY, LIGHT, INK = "#8a8a8a", "#d9d9d9", "#222222"
# How far below the floor points are shown, in distances from the floor to 1.
DEPTH = 2
# Episodes behind a running mean.
WINDOW = 5


@dataclass(frozen=True)
class LearnedRun:
    """What a learned run left to be drawn.

    Attributes:
        title: what was run.
        episodes: as they were played, none where another run's have taught the policy; ``last`` is
            the run with the learned policy. A search has no such run: there, it is the trial that
            was taken.
        facts: the record's, of the trade-off.
        every: steps of an action.
    """

    title: str
    episodes: tuple[Episode, ...]
    last: Episode
    front: tuple[Entry, ...]
    facts: dict[str, Any]
    every: int

    @classmethod
    def load(cls, run: Path) -> LearnedRun:
        """Read a run's folder. Raises PatchError or DataError if it holds no learned run."""
        entries, record = load_front(run), RunRecord.load(run)
        path = run / EPISODES_NAME
        try:
            _, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            facts = record.training["tradeoff"]
            played = tuple(map(Episode.from_dict, lines))
            searched = facts["kind"] == "search"
            last = played[facts["chosen"]["episode"] if searched else -1]
            every = int(facts["action_steps"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                what=f"What {run} holds of a learned trade-off cannot be read",
                got=f"{type(error).__name__}: {error}",
                allowed=f"{EPISODES_NAME} and record.json as the finished run left them",
                fix="give the folder of a finished run with --tradeoff learned",
            ) from error
        title = f"{record.function} · {record.objective} · seed {record.seed}"
        episodes = played if searched else played[:-1]
        return cls(title, episodes, last, tuple(entries), facts, every)

    @property
    def searched(self) -> bool:
        """Whether whole runs were tried, and nothing was learned."""
        return bool(self.facts["kind"] == "search")

    @property
    def seen(self) -> list[Point]:
        """All points, of all episodes."""
        return [point for one in (*self.episodes, self.last) for point in one.points.values()]

    @property
    def floor(self) -> float:
        """Retain at which a point is worth nothing."""
        return float(self.facts["looked_at"]["floor"])


def tradeoff_figure(run: Path, path: Path | str) -> Path:
    """Draw a learned run: reward by episode, the points with the front, the last run's knobs.

    The same folder gives the same bytes.

    Args:
        run: folder of a finished run with a learned trade-off.
        path: ends in .svg or .png; written atomically.

    Raises:
        PatchError: no front there.
        DataError: the run is not finished.
        RecipeError: another suffix.
        ExpungeError: matplotlib is not installed.
        ResourceError: the file cannot be written.
    """
    path, learned = Path(path), LearnedRun.load(run)
    with drawn(path, (12.5, 4.4)) as figure:
        figure.set_layout_engine("constrained", w_pad=0.12)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
        _rewards(left, learned)
        _points(middle, learned)
        _knobs(right, learned)
        for axis in (left, middle, right):
            axis.spines["top"].set_visible(False)
            axis.title.set_fontweight("bold")
        kind = "search" if learned.searched else "learned trade-off"
        figure.suptitle(f"{learned.title} · {kind}", fontsize=10, color=GREY)
    return path


def _rewards(axis: Axes, learned: LearnedRun) -> None:
    """Each episode's hypervolume, and the running mean of those that a policy played."""
    from matplotlib.ticker import MaxNLocator

    played = [episode.reward for episode in learned.episodes]
    n = len(played)
    one = "trial" if learned.searched else "episode"
    by_chance = sum(episode.role == "drawn" for episode in learned.episodes)
    for numbers, marker, colour, label in (
        (range(min(n, 1)), "o", "white", "usual values, a whole run"),
        (range(1, 1 + by_chance), "D", "white", "knobs drawn evenly"),
        (range(1 + by_chance, n), "o", SKY, one if learned.searched else "by the policy"),
    ):
        if numbers:
            rewards = [played[number] for number in numbers]
            axis.plot(
                numbers, rewards, marker, color=SKY, markerfacecolor=colour, markersize=5,
                label=label,
            )  # fmt: skip
    if n > 2 + by_chance and not learned.searched:
        mean = _running_mean(played[1 + by_chance :], WINDOW)
        label = f"mean of the last {WINDOW}"
        axis.plot(range(1 + by_chance, n), mean, color=BLUE, linewidth=2, label=label)
    label = "taken" if learned.searched else f"last run ({learned.last.steps} steps)"
    place = learned.last.number if learned.searched else n
    axis.plot([place], [learned.last.reward], "*", color=VERMILLION, markersize=13, label=label)
    axis.set(title=f"Reward by {one}", xlabel=one, ylabel="hypervolume on validation")
    axis.set_ylim(bottom=0, top=max([*played, learned.last.reward, 0.05]) * 1.1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axis)


def _points(axis: Axes, learned: LearnedRun) -> None:
    """All that looks saw, the front with its numbers, the base, the floor, the chosen point."""
    floor = learned.floor
    # As far down as there are points, within limits.
    kept = [entry.point for entry in learned.front]
    lowest = min(point.retain for point in (*learned.seen, *kept)) - 0.1 * (1 - floor)
    deepest, least = (max(0.0, floor - depth * (1 - floor)) for depth in (DEPTH, 0.4))
    bottom = min(max(lowest, deepest), least)
    height = 1 - bottom
    for episodes, colour, size, label in (
        (learned.episodes, LIGHT, 16, "trials" if learned.searched else "episodes"),
        ((learned.last,), SKY, 22, "trial taken" if learned.searched else "last run"),
    ):
        if not episodes:
            continue
        seen = [point for episode in episodes for point in episode.points.values()]
        inside = [point for point in seen if point.retain >= bottom]
        axis.scatter(
            *_axes(inside), s=size, color=colour, edgecolor=GREY, linewidth=0.4, label=label
        )
        below = [point.forget for point in seen if point.retain < bottom]
        axis.scatter(
            below, [bottom + 0.012 * height] * len(below), marker="v", s=size, color=colour,
            edgecolor=GREY, linewidth=0.4,
        )  # fmt: skip
    # A closer look may have found that one dominates another.
    worthy = [kept[place] for place in front(kept) if kept[place].retain > floor]
    # What the front dominates: a staircase down to the right, above the floor.
    xs, ys = [0.0], [max((point.retain for point in worthy), default=floor)]
    for place, point in enumerate(worthy):
        xs += [point.forget, point.forget]
        ys += [point.retain, worthy[place + 1].retain if place + 1 < len(worthy) else floor]
    axis.fill_between(xs, ys, floor, color=BLUE, alpha=0.10, linewidth=0)
    axis.plot(xs, ys, color=BLUE, linewidth=1, alpha=0.6)
    axis.plot(*_axes(kept), "o", color=BLUE, markersize=6, label="front, seen closer")
    right = min(1.0, 1.2 * max(point.forget for point in kept)) or 1.0
    for point, numbers in _numbered(kept, 0.07 * right, 0.04 * height):
        axis.annotate(
            numbers, point, xytext=(4, 5), textcoords="offset points", color=BLUE, fontsize=8
        )
    taken = [entry.point for entry in learned.front if entry.chosen]
    axis.plot(
        *_axes(taken), "o", color=VERMILLION, fillstyle="none", markersize=11, markeredgewidth=1.8,
        label="chosen",
    )  # fmt: skip
    axis.plot([0], [1], "s", color=INK, markersize=7, label="base", clip_on=False)
    axis.axhline(floor, color=INK, linewidth=1, linestyle="--", label=f"retain floor {floor:g}")
    axis.set(title="Points on validation", xlabel="forget  (0: as the base, 1: all gone)")
    axis.set_ylabel("retain  (1: as the base)")
    axis.set(xlim=(-0.03 * right, 1.03 * right), ylim=(bottom, 1 + 0.04 * height))
    axis.spines["right"].set_visible(False)
    _legend_below(axis, 3)


def _numbered(points: Sequence[Point], near_x: float, near_y: float) -> list[tuple[Point, str]]:
    """Where to write the points' numbers, from 1; those close to each other share a place."""
    places: list[tuple[Point, list[str]]] = []
    for number, point in enumerate(points, 1):
        for first, numbers in places:
            if (
                abs(point.forget - first.forget) < near_x
                and abs(point.retain - first.retain) < near_y
            ):
                numbers.append(str(number))
                break
        else:
            places.append((point, [str(number)]))
    return [(first, ", ".join(numbers)) for first, numbers in places]


def _knobs(axis: Axes, learned: LearnedRun) -> None:
    """The knobs by step, in multiples of what a run without learning uses."""
    edges = [place * learned.every for place in range(len(learned.last.knobs))]
    edges.append(learned.last.steps)
    scales = learned.facts["knobs"]
    linear = [name for name, scale in scales.items() if scale["scale"] == "linear"]
    other = axis.twinx() if linear and len(linear) < len(scales) else axis
    lines = []
    for place, (name, scale) in enumerate(scales.items()):
        # A knob whose usual value is 0 has no multiples of it.
        unit = scale["usual"] or scale["high"]
        values = [knobs[name] / unit for knobs in learned.last.knobs]
        label = f"{name.replace('_', ' ')} (usual {scale['usual']:.3g})"
        colour = KNOB_COLOURS[place % len(KNOB_COLOURS)]
        own = other if name in linear else axis
        lines += own.plot(
            edges[: len(values) + 1],
            [*values, *values[-1:]],
            drawstyle="steps-post",
            color=colour,
            linestyle="--" if name in linear else "-",
            linewidth=2,
            label=label,
        )
    axis.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    title = f"Knobs of the {'trial taken' if learned.searched else 'last run'}"
    axis.set(title=title, xlabel="step", ylabel="multiple of the usual value")
    if len(linear) < len(scales):
        _multiples(axis)
    if other is not axis:
        other.set_ylabel("dashed: multiple, linear")
        _align(axis, other)
        other.spines["top"].set_visible(False)
    else:
        axis.spines["right"].set_visible(False)
    axis.legend(
        handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8
    )


def _align(axis: Axes, linear: Axes) -> None:
    """Put 1 at one height on a logarithmic axis and on a linear one that begins at 0."""
    low, high = axis.get_ylim()
    share = math.log(1 / low) / math.log(high / low)
    top = max(1 / share, linear.get_ylim()[1])
    axis.set_ylim(low, low ** (1 - top))
    linear.set_ylim(0, top)


def _multiples(axis: Axes) -> None:
    """A logarithmic axis around 1, labelled as people say it: 0.5, 1, 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.4), max(high, 2.5))
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))


def _axes(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points as matplotlib wants them."""
    return [forget for forget, _ in points], [retain for _, retain in points]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of each value and those before it, ``width`` in all or as many as there are."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _legend_below(axis: Axes, columns: int = 2) -> None:
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=8
    )
