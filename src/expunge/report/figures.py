"""What is drawn: forgetting against keeping, a run's curves, probes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.comparison import Cell
from expunge.evaluation.pareto import front
from expunge.records import RunRecord
from expunge.report.groups import Group, slug_of
from expunge.report.plot import ORACLE_SERIES, Axis, Dot, Line, Plot, linear, logarithmic, shares
from expunge.report.shown import finite, percent
from expunge.training.watch import Point

Pairs = tuple[tuple[float, float], ...]
# Points of one figure, shared by its lines; so that pages of many runs stay small.
POINTS = 300
# From so many methods on, they are shown side by side.
MANY = 3
# Points of a line that are marked one by one.
MARKED = 12


def scatter(function: str, groups: Sequence[Group], oracle: Cell | None = None) -> Plot | None:
    """Each seed's forgetting and keeping, each method's mean, and the front of all seeds.

    Args:
        groups: those of the function.
        oracle: of the function; no part of the front.
    """
    dots, means, legend = [], [], []
    for group in groups:
        row = group.row
        for cell in group.cells:
            seen = _point(cell)
            if seen is not None:
                text = f"{group.method}, seed {cell.place.seed}: {_both(*seen)}"
                dots.append(Dot(*seen, group.series, "seed", text))
        if row.harmonic.mean is None or row.forget.mean is None or row.retain.mean is None:
            continue
        x, y = row.forget.mean, row.retain.mean
        means.append(Dot(x, y, group.series, "mean", f"{group.method}, mean: {_both(x, y)}"))
        volume = row.hypervolume.mean
        told = group.method + ("" if volume is None else f": {percent(volume)}")
        legend.append((group.series, told))
    if not dots:
        return None
    points = [Point(dot.x, dot.y) for dot in dots]
    best = [points[at] for at in front(points)]
    aim = _point(oracle) if oracle is not None else None
    if aim is not None:
        means.append(Dot(*aim, ORACLE_SERIES, "mean", f"retrained oracle: {_both(*aim)}"))
        legend.append((ORACLE_SERIES, "retrained oracle"))
    every = [(dot.x, dot.y) for dot in (*dots, *means)]
    x_axis = shares([x for x, _ in every], "forgotten, %")
    y_axis = shares([y for _, y in every], "kept of the rest, %")
    return Plot(
        f"forget-retain-{slug_of(function)}",
        function,
        f"Forgetting across, keeping up. {'; '.join(dot.text for dot in means)}.",
        x_axis,
        y_axis,
        (Line(_stairs(best, x_axis, y_axis), kind="front"),),
        (*dots, *means),
        tuple(legend),
    )


def overview(groups: Sequence[Group], functions: Sequence[str]) -> Plot | None:
    """Each method's harmonic mean on each function, with its interval over seeds."""
    methods = list(dict.fromkeys(group.method for group in groups))
    if len(methods) < MANY:
        return None
    places = {method: len(methods) - 1 - at for at, method in enumerate(methods)}
    dots, lines = [], []
    for group in groups:
        spread, series = group.row.harmonic, functions.index(group.function)
        if spread.mean is None:
            continue
        # Functions side by side, so that no interval hides another.
        y = places[group.method] + 0.16 * (len(functions) - 1 - 2 * series)
        dots.append(Dot(spread.mean, y, series, "mean", f"{group.name}: {percent(spread.mean)}"))
        if spread.ci_low is not None and spread.ci_high is not None:
            lines.append(Line(((spread.ci_low, y), (spread.ci_high, y)), series, "thin"))
    return Plot(
        "matrix",
        "Every method, every function",
        "; ".join(dot.text for dot in dots),
        Axis("harmonic mean, %", 0.0, 1.0, tuple((tick / 5, f"{20 * tick}") for tick in range(6))),
        Axis("", -0.6, len(methods) - 0.4, tuple((at, name) for name, at in places.items())),
        tuple(lines),
        tuple(dots),
        tuple(enumerate(functions)),
        left=140,
        body=60 + 22 * len(methods),
    )


def _point(cell: Cell) -> tuple[float, float] | None:
    if cell.forget is None or cell.retain is None:
        return None
    return cell.forget, cell.retain


def _both(x: float, y: float) -> str:
    return f"forgotten {percent(x)} %, kept {percent(y)} %"


def _stairs(points: Sequence[Point], x: Axis, y: Axis) -> Pairs:
    """The edge of the area that a front dominates, from left to right."""
    found = [(x.low, points[0].retain)]
    for at, point in enumerate(points):
        after = points[at + 1].retain if at + 1 < len(points) else y.low
        found += [(point.forget, point.retain), (point.forget, after)]
    return tuple(found)


def curves(name: str, runs: Sequence[RunRecord]) -> list[Plot]:
    """Losses, gradient norm, looks at validation and knobs, a line for each seed."""
    found = [_curve(run) for run in runs]
    seeds = tuple((at, f"seed {run.seed}") for at, run in enumerate(runs))
    seeds = seeds if len(runs) > 1 else ()
    losses = {"loss": "loss, weighed sum", "forget": "loss on what is to go"}
    losses |= {"retain": "loss on what is to stay", "gradient_norm": "norm of the gradient"}
    plots = [
        _over_steps(f"{name}-{slug_of(key)}", title, [_column(one, key) for one in found], seeds)
        for key, title in losses.items()
    ]
    for at, title in ((1, "validation: forgotten, %"), (2, "validation: kept, %")):
        lines = [_looks(one, at) for one in found]
        plots.append(
            _over_steps(f"{name}-validation-{at}", title, lines, seeds, share=True, marked=True)
        )
    for group, what in (("knobs", "knob"), ("logs", "watched")):
        keys = dict.fromkeys(key for one in found for key in _group(one, group))
        for key in keys:
            lines = [_column({**_group(one, group), "step": one.get("step")}, key) for one in found]
            plots.append(
                _over_steps(
                    f"{name}-{group}-{slug_of(key)}",
                    f"{what}: {key}",
                    lines,
                    seeds,
                    log=group == "knobs",
                )
            )
    rewards = [_rewards(run) for run in runs]
    plots.append(
        _over_steps(f"{name}-rewards", "reward of each episode", rewards, seeds, x="episode")
    )
    plots += [_front(f"{name}-front-seed{run.seed}", run) for run in runs]
    return [plot for plot in plots if plot is not None]


def probe_plot(name: str, title: str, run: RunRecord) -> Plot | None:
    """Held-out accuracy of probes by layer, of the base and of the patched model."""
    told = run.training.get("probe_accuracy")
    if not isinstance(told, dict):
        return None
    lines = {side: _pairs(told.get(side)) for side in ("before", "after")}
    held = {side: line for side, line in lines.items() if line}
    if not held:
        return None
    every = [point for line in held.values() for point in line]
    x = linear([layer for layer, _ in every], "decoder layer", whole=True)
    y = shares([0.5, *(accuracy for _, accuracy in every)], "held-out accuracy, %")
    said = {"before": "base", "after": "patched"}
    drawn = [(at, side) for at, side in enumerate(lines) if side in held]
    return Plot(
        name,
        title,
        "; ".join(
            f"{said[side]}: " + ", ".join(f"layer {a:g} {percent(b)} %" for a, b in line)
            for side, line in held.items()
        ),
        x,
        y,
        (
            *(Line(held[side], at) for at, side in drawn),
            Line(((x.low, 0.5), (x.high, 0.5)), kind="rule"),
        ),
        tuple(
            Dot(a, b, at, "small", f"{said[side]}, layer {a:g}: {percent(b)} %")
            for at, side in drawn
            for a, b in held[side]
        ),
        tuple((at, said[side]) for at, side in drawn),
    )


def _front(name: str, run: RunRecord) -> Plot | None:
    """The points on validation that a learned trade-off kept."""
    facts = run.training.get("tradeoff")
    told = facts.get("front") if isinstance(facts, dict) else None
    points = [Point(*pair) for pair in _pairs(told)]
    if not points:
        return None
    x_axis = shares([point.forget for point in points], "forgotten, %")
    y_axis = shares([point.retain for point in points], "kept of the rest, %")
    best = [points[at] for at in front(points)]
    volume = finite(facts.get("hypervolume")) if isinstance(facts, dict) else None
    seen = "" if volume is None else f", hypervolume {percent(volume)} %"
    return Plot(
        name,
        f"front on validation, seed {run.seed}{seen}",
        "; ".join(_both(*point) for point in points),
        x_axis,
        y_axis,
        (Line(_stairs(best, x_axis, y_axis), kind="front"),),
        tuple(Dot(*point, 0, "mean", _both(*point)) for point in points),
    )


def _over_steps(
    name: str,
    title: str,
    lines: Sequence[Pairs],
    legend: tuple[tuple[int, str], ...],
    *,
    x: str = "step",
    share: bool = False,
    log: bool = False,
    marked: bool = False,
) -> Plot | None:
    lines = [_thinned(line, max(20, POINTS // len(lines))) for line in lines]
    every = [point for line in lines for point in line]
    if len(every) < 2:
        return None
    heights = [height for _, height in every]
    log = log and min(heights) > 0
    y = shares(heights, "") if share else (logarithmic if log else linear)(heights, "")
    dots = (
        Dot(a, b, at, "small", f"{x} {a:g}: {percent(b) + ' %' if share else f'{b:.4g}'}")
        for at, line in enumerate(lines)
        for a, b in (line if (marked and len(line) <= MARKED) or len(line) == 1 else ())
    )
    ends = "; ".join(f"from {line[0][1]:.3g} to {line[-1][1]:.3g}" for line in lines if line)
    return Plot(
        name,
        title,
        f"{title} over each {x}: {ends}.",
        linear([place for place, _ in every], x, whole=True),
        y,
        tuple(
            Line(line, at, "thin" if len(lines) > 1 else "line")
            for at, line in enumerate(lines)
            if line
        ),
        tuple(dots),
        legend,
    )


def _thinned(line: Pairs, most: int) -> Pairs:
    """At most so many points of a line, evenly, its last among them."""
    n = min(len(line), most)
    return tuple(line[len(line) - 1 - at * len(line) // n] for at in reversed(range(n)))


def _curve(run: RunRecord) -> Mapping[str, Any]:
    told = run.training.get("curve")
    return told if isinstance(told, dict) else {}


def _group(curve: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    told = curve.get(name)
    return told if isinstance(told, dict) else {}


def _column(curve: Mapping[str, Any], key: str) -> Pairs:
    steps, values = curve.get("step"), curve.get(key)
    if not isinstance(steps, list) or not isinstance(values, list):
        return ()
    return _pairs(list(zip(steps, values, strict=False)))


def _looks(curve: Mapping[str, Any], at: int) -> Pairs:
    told = curve.get("points")
    rows = told if isinstance(told, list) else []
    return _pairs([(row[0], row[at]) for row in rows if isinstance(row, list) and len(row) == 3])


def _rewards(run: RunRecord) -> Pairs:
    facts = run.training.get("tradeoff")
    told = facts.get("rewards") if isinstance(facts, dict) else None
    return _pairs(list(enumerate(told))) if isinstance(told, list) else ()


def _pairs(rows: Any) -> Pairs:
    """Rows of two numbers; others are left out."""
    found = []
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, (list, tuple)) and len(row) == 2:
            a, b = map(finite, row)
            if a is not None and b is not None:
                found.append((a, b))
    return tuple(found)
