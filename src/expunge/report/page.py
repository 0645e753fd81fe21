"""What stands on the page, as one value: the template only lays it out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from expunge.comparison import Cell, Comparison, Row
from expunge.report import figures
from expunge.report.flips import Flips, flips
from expunge.report.gather import Gathered, Source
from expunge.report.groups import (
    Budget,
    Group,
    Prompted,
    ScoreLine,
    budget,
    groups_of,
    samples,
    score_lines,
)
from expunge.report.plot import Plot
from expunge.report.settings import Difference, Fact, origins, settings
from expunge.report.shown import percent, times
from expunge.report.unmeasured import unmeasured


@dataclass(frozen=True)
class Drawn:
    """A group's own figures."""

    group: Group
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Changed:
    """A group's questions that changed sides."""

    group: Group
    sides: tuple[Flips, ...]

    @property
    def any(self) -> bool:
        """Whether any did."""
        return any(side.lost or side.won for side in self.sides)


@dataclass(frozen=True)
class Verdict:
    """What the page opens with.

    Attributes:
        word: in short; empty where nothing was tested.
        more: what would decide an open one, or why there is none.
    """

    word: str
    sentence: str
    more: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order.

    Attributes:
        single: whether it is of one run: then there is no matrix and no test.
        functions, methods: of the matrix, in order.
    """

    title: str
    single: bool
    verdict: Verdict
    comparison: Comparison
    groups: tuple[Group, ...]
    functions: tuple[str, ...]
    methods: tuple[str, ...]
    scores: tuple[ScoreLine, ...]
    overview: Plot | None
    scatters: tuple[Plot, ...]
    probes: tuple[Drawn, ...]
    curves: tuple[Drawn, ...]
    changed: tuple[Changed, ...]
    samples: tuple[Prompted, ...]
    budgets: tuple[Budget, ...]
    different: tuple[Difference, ...]
    shared: tuple[tuple[str, str], ...]
    origins: tuple[Fact, ...]
    sources: tuple[Source, ...]
    unmeasured: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def oracle(self, function: str) -> Cell | None:
        """The model that was never taught the function, where it was measured."""
        found = (cell for cell in self.comparison.oracles if cell.place.function == function)
        return next(found, None)

    def series(self, method: str) -> int:
        """The colour and shape of a method."""
        return next((group.series for group in self.groups if group.method == method), 0)

    def together(self) -> list[Group]:
        """Groups on interference, each function's after those of its methods alone."""
        combined = self.groups[len(self.comparison.rows) :]
        found: list[Group] = []
        for function in dict.fromkeys(group.function for group in combined):
            own = [group for group in combined if group.function == function]
            parts = {part for one in own for part in re.split(r" \+ |, | then ", one.row.method)}
            found += [
                group
                for group in self.groups[: len(self.comparison.rows)]
                if group.function == function and group.method in parts
            ]
            found += own
        return found

    @property
    def plots(self) -> tuple[Plot, ...]:
        """All figures."""
        return (
            *((self.overview,) if self.overview else ()),
            *self.scatters,
            *(plot for drawn in (*self.probes, *self.curves) for plot in drawn.plots),
        )


def page_of(gathered: Gathered, comparison: Comparison) -> Page:
    """Compute what a page of these records shows."""
    groups = groups_of(comparison)
    functions = tuple(dict.fromkeys(row.function for row in comparison.rows))
    by_name = {group.name: group.records for group in groups}
    different, shared = settings(by_name)
    oracles = {cell.place.function: cell for cell in comparison.oracles}
    scatters = (
        figures.scatter(
            function, [one for one in groups if one.function == function], oracles.get(function)
        )
        for function in dict.fromkeys(group.function for group in groups)
    )
    single = len(gathered.sources) == 1
    return Page(
        title=", ".join(dict.fromkeys(group.function for group in groups)) or "no run measured",
        single=single,
        verdict=_verdict(comparison, single),
        comparison=comparison,
        groups=groups,
        functions=functions,
        methods=tuple(dict.fromkeys(row.method for row in comparison.rows)),
        scores=score_lines(gathered.records[0]) if single else (),
        overview=figures.overview(groups[: len(comparison.rows)], functions),
        scatters=tuple(plot for plot in scatters if plot is not None),
        probes=tuple(drawn for drawn in map(_probes, groups) if drawn.plots),
        curves=tuple(drawn for drawn in map(_curves, groups) if drawn.plots),
        changed=tuple(changed for changed in map(_changed, groups) if changed.sides),
        samples=samples(groups),
        budgets=tuple(map(budget, groups)),
        different=different,
        shared=shared,
        origins=origins(gathered.sources),
        sources=gathered.sources,
        unmeasured=unmeasured(comparison, {group.name: group.cells for group in groups}),
        left_out=gathered.left_out,
    )


def _probes(group: Group) -> Drawn:
    plots = (
        figures.probe_plot(f"probes-{group.slug}", group.name, record)
        for record in group.records[:1]
    )
    return Drawn(group, tuple(plot for plot in plots if plot is not None))


def _curves(group: Group) -> Drawn:
    return Drawn(group, tuple(figures.curves(f"curves-{group.slug}", group.records)))


def _changed(group: Group) -> Changed:
    sides = (flips("forget", group.records), flips("retain", group.records))
    return Changed(group, tuple(side for side in sides if side is not None))


def _verdict(comparison: Comparison, single: bool) -> Verdict:
    """The comparison's own; without one, what the best method on each function did."""
    own = comparison.verdict
    if own is not None and not single:
        return Verdict(own.word, own.sentence, own.power)
    rows = comparison.rows or comparison.interference
    best: dict[str, Row] = {}
    for row in rows:
        held = best.get(row.function)
        if held is None or (row.harmonic.mean or 0) > (held.harmonic.mean or 0):
            best[row.function] = row
    told = [_told(row, single) for row in best.values()]
    why = comparison.verdict_reason
    more = "" if single or why is None else f"No verdict on the methods: {why}."
    return Verdict("", "; ".join(told) + "." if told else "No run was measured.", more)


def _told(row: Row, single: bool) -> str:
    if row.harmonic.mean is None or row.forget.mean is None or row.retain.mean is None:
        reason = next((cell.reason for cell in row.cells if cell.reason), "no score")
        return f"{row.method} on {row.function} was not measured ({reason})"
    if row.diverged == len(row.cells):
        return f"{row.method} diverged on {row.function}: nothing it did counts"
    seeds = times(row.harmonic.n, "seed")
    shares = (
        f"{percent(row.forget.mean)} % removed and {percent(row.retain.mean)} % of the rest kept"
    )
    if single:
        return f"{row.method} on {row.function}: {shares}"
    return f"{row.method} has the highest mean on {row.function}: {shares} ({seeds})"
