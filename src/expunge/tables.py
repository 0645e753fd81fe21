"""Results as tables for a terminal. Names and data are printed as they are, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expunge.records import RunRecord, Score
from expunge.registry import Entry

if TYPE_CHECKING:
    from expunge.comparison import Comparison, Row
    from expunge.demo import DemoSummary
    from expunge.evaluation.stats import Spread
    from expunge.metalearning.archive import Entry as Point
    from expunge.model.lora import LoraExport
    from expunge.model.patch import Patch
    from expunge.plan import Plan
    from expunge.probes.probe import Probe

ROLES = ("base", "patched", "oracle")
GIB = 2**30
# So that a demo's table fits a terminal of 80 columns.
SHORT = {
    "forget_accuracy": "forget acc.",
    "retain_accuracy": "retain acc.",
    "forget_nll": "forget nats",
    "retain_nll": "retain nats",
    "perplexity": "text ppl",
    "toxicity_rate": "toxic",
    "fluency": "fluent ppl",
    "neutral_nll": "neutral nats",
    "detoxification": "detox score",
}
# What a line tells of a run; a function lacks what does not concern it.
RUN_COLUMNS = {
    "forget_accuracy": "forget",
    "toxicity_rate": "toxic",
    "retain_accuracy": "retain",
    "perplexity": "perplexity",
}


def print_record(console: Console, record: RunRecord) -> None:
    """A run's scores, models side by side, and its times."""
    title = f"{record.function} · {record.objective} · seed {record.seed}"
    if record.scores:
        console.print(_scores_table(title, record.scores))
    else:
        console.print(title, markup=False, highlight=False)
    calibration = record.training.get("calibration")
    if calibration:
        console.print(_calibration_table(calibration))
    collapsed, restored = (record.training.get(name) for name in ("collapsed", "restored"))
    if isinstance(collapsed, int):  # of a sum of patches there is one for each part
        console.print(
            f"what was to be kept collapsed after {collapsed} steps; "
            f"what is taken is, or is made of, the state after {restored} steps",
            markup=False,
            highlight=False,
        )
    reads = record.training.get("split_reads", {})
    if reads:
        counts = ", ".join(f"{split} {_times(n)}" for split, n in reads.items())
        console.print(f"read for this run: {counts}", markup=False, highlight=False)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record.timing.items())
    memory = f"peak memory {record.peak_memory_bytes / GIB:.2f} GiB"
    console.print(f"{times}; {memory}", markup=False, highlight=False)


def print_front(console: Console, front: Sequence[Point], record: RunRecord) -> None:
    """The points that a learned trade-off kept, by forgetting; the run's own is marked."""
    facts = record.training["tradeoff"]
    floor = facts["looked_at"]["floor"]
    worth = f"forget times retain, nothing at {floor:g} or below"
    if "lost_at" in facts["looked_at"]:
        worth = f"by an earlier rule: retain counted 0 at {facts['looked_at']['lost_at']:g}"
    table = Table(
        title=f"front on validation: hypervolume {facts['hypervolume']:.3f} above retain {floor:g}",
        caption=f"looks: {facts['reward']}; worth: {worth}",
    )
    for column in ("point", "forget", "retain", "worth", "step", "scale"):
        table.add_column(column, justify="right")
    table.add_column("of")
    table.add_column("")
    for number, entry in enumerate(front, 1):
        sources = [entry.episode, *(entry.other or ())[:1]]
        last = facts["episodes"]
        of = " and ".join("the last run" if n == last else f"episode {n}" for n in sources)
        table.add_row(
            str(number),
            *(f"{value:.3f}" for value in (*entry.point, entry.worth)),
            str(entry.step),
            f"{entry.scale:g}",
            of,
            "chosen" if entry.chosen else "",
            style="bold" if entry.chosen else None,
        )
    console.print(table)
    runs = f"{facts['episodes']} episodes and the last run"
    if facts["kind"] == "search":
        runs = f"{facts['episodes']} whole runs"
    told = f"{runs}: {facts['inner_steps']} steps"
    console.print(f"{told}, {_duration(facts['seconds'])}", markup=False, highlight=False)


def print_scores(console: Console, scores: Sequence[Score]) -> None:
    """Scores of one model."""
    console.print(_scores_table("scores", scores))


def print_comparison(console: Console, found: Comparison) -> None:
    """The verdict, a line for each method on each function, and what a reader must know."""
    verdict = found.verdict
    told = verdict.sentence if verdict else f"No verdict: {found.verdict_reason}"
    console.print(Text(told, style="bold"))
    if verdict and verdict.power:
        console.print(Text(verdict.power))
    of_matrix = {(test.function, test.other): test.p_adjusted for test in found.tests}
    together = {(test.function, test.own): test.p_adjusted for test in found.interference_tests}
    for title, rows, adjusted in (
        ("", found.rows, of_matrix),
        (", several functions at once", found.interference, together),
    ):
        for function in dict.fromkeys(row.function for row in rows):
            table = Table(title=f"{function}{title}, mean ± sd over n seeds", box=SIMPLE_HEAD)
            table.add_column("method (n)", no_wrap=True)
            for name in ("forget", "retain", "harmonic", "hypervolume", "p", "steps", "looks"):
                table.add_column(name, justify="right")
            for row in rows:
                if row.function != function:
                    continue
                p = adjusted.get((function, row.method))
                table.add_row(
                    Text(f"{row.method} ({_counts(row)})"),
                    *map(_spread, (row.forget, row.retain, row.harmonic, row.hypervolume)),
                    "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}",
                    *(_or_dash(row.total(name)) for name in ("inner_steps", "looks")),
                )
            console.print(table)
    console.print(Text("p: of the difference to the function's own objective, after Holm"))
    for note in found.notes:
        console.print(Text(f"note: {note}"))


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def _counts(row: Row) -> str:
    """How many seeds, and how many of them came to nothing."""
    told = [str(len(row.cells) - row.missing)]
    told += [f"{row.diverged} diverged"] if row.diverged else []
    return ", ".join([*told, f"{row.missing} missing"] if row.missing else told)


def print_demo(console: Console, summary: DemoSummary) -> None:
    """A line for each kind of run, mean ± standard deviation over seeds, base and oracle beside."""
    for part in (summary.knowledge, summary.toxicity):
        table = Table(title=f"{part.title}, mean ± sd over n seeds", box=SIMPLE_HEAD)
        base, oracle = ({s.key: s for s in scores} for scores in (part.base, part.oracle))
        keys = part.shown()
        table.add_column("model (n)", no_wrap=True)
        for name, scorer, _ in keys:
            judged = f" ({scorer.partition(':')[0]})" if scorer else ""
            table.add_column(Text(SHORT.get(name, name) + judged), justify="right")
        table.add_row("base", *(_value(base[key]) for key in keys))
        for one in part.columns:
            cells = [_spread(one.spread(*key)) for key in keys]
            table.add_row(f"{one.name} ({len(one.records)})", *cells)
        table.add_row("retrained oracle", *(_value(oracle[key]) for key in keys))
        console.print(table)
    console.print(f"{summary.seconds:.0f} s in all", markup=False, highlight=False)


def print_plan(console: Console, plan: Plan) -> None:
    """A plan, a line each; beside it what a learned trade-off makes of it."""
    learned = plan.learned
    one = {
        "layers read": f"{plan.layers_read} of {plan.layers_total}",
        "trained": ", ".join(map(str, plan.trained_layers)),
        "weights read": f"{_gib(plan.bytes_read)} of {_gib(plan.bytes_total)} GiB",
        "work, prefix": f"{plan.flops_prefix:.2e} operations",
        "work, steps": f"{plan.flops_train:.2e}",
        "work, looks": "none",
        "work, end": "none",
        "weights, optimiser": f"{_gib(plan.memory_weights)} GiB",
        "a step, estimate": f"{_gib(plan.memory_step)} GiB",
        "both, estimate": f"{_gib(plan.memory_weights + plan.memory_step)} GiB",
        "boundaries": f"{_gib(plan.memory_boundaries)} GiB, RAM or file",
        "time": f"about {_duration(plan.seconds)}",
    }
    table = Table(title="plan")
    table.add_column("")
    table.add_column("one run")
    if learned is None:
        for name, value in one.items():
            table.add_row(name, value)
    else:
        run = f"{learned.episodes - 1} x {learned.episode_steps} + 2 runs"
        by_angles = learned.reward == "representation"
        what = "texts" if by_angles else "questions"
        looks = f"{learned.looks} x 2 x {learned.look_items} {what}"
        whole = {
            "layers read": f"{plan.layers_total} of {plan.layers_total}",
            "weights read": f"{_gib(plan.bytes_total)} GiB",
        }
        more = {
            **({} if by_angles else whole),
            "work, steps": f"{learned.flops_train:.2e}: {run}",
            "work, looks": f"{learned.flops_looks:.2e}: {looks}",
            "work, end": f"{learned.flops_closer:.2e}: {learned.closer_looks} closer looks",
            "weights, optimiser": f"{_gib(learned.memory_weights)} GiB",
            "both, estimate": f"{_gib(learned.memory_weights + plan.memory_step)} GiB",
            "time": f"about {_duration(learned.seconds)}",
        }
        table.add_column("learned trade-off")
        for name, value in one.items():
            table.add_row(name, value, more.get(name, "the same"))
    where = (
        f"measured here on {plan.device}"
        if plan.measured
        else f"published for {plan.device}: a rough guess"
    )
    speed = f"{plan.matmul_flops / 1e12:.3g} TFLOP/s in {plan.dtype}"
    table.caption = f"time: at {plan.efficiency:.0%} of {speed}, {where}"
    console.print(table)


def print_runs(console: Console, records: Sequence[tuple[Path, RunRecord]]) -> None:
    """One line a run."""
    table = Table(title=f"{len(records)} runs")
    for column in ("run", "function", "objective", "seed", *RUN_COLUMNS.values()):
        table.add_column(column)
    for path, record in records:
        scores = [record.score(name) for name in RUN_COLUMNS]
        cells = ["" if score is None else _value(score) for score in scores]
        row = [str(path), record.function, record.objective, str(record.seed), *cells]
        table.add_row(*map(Text, row))
    console.print(table)


def print_parts(console: Console, parts: Mapping[str, Iterable[Entry[Any]]]) -> None:
    """Registered parts with their sources."""
    for kind, entries in parts.items():
        table = Table(title=kind)
        for column in ("name", "source", "deviations"):
            table.add_column(column)
        for entry in entries:
            table.add_row(entry.name, Text(entry.source), Text(entry.deviations))
        console.print(table)


def print_patch(console: Console, patch: Patch) -> None:
    """What a patch changes."""
    table = Table(title=f"patch of {len(patch)} tensors, norm {patch.norm():.4g}")
    for column in ("tensor", "shape", "norm"):
        table.add_column(column)
    for name in patch.names:
        delta = patch.deltas[name]
        table.add_row(Text(name), str(tuple(delta.shape)), f"{float(delta.norm()):.4g}")
    console.print(table)


def print_probes(console: Console, probes: Sequence[Probe]) -> None:
    """Held-out accuracy by layer, beside the control on shuffled labels."""
    first = probes[0]
    table = Table(title=f"probes: {first.kind}, {first.pooling} pooling, {first.n} held-out texts")
    for column in ("layer", "accuracy", "AUROC", "control"):
        table.add_column(column, justify="right")
    for probe in probes:
        table.add_row(
            str(probe.layer),
            f"{probe.accuracy:.3f} [{probe.accuracy_low:.3f}, {probe.accuracy_high:.3f}]",
            f"{probe.auroc:.3f} [{probe.auroc_low:.3f}, {probe.auroc_high:.3f}]",
            f"{probe.control:.3f}",
        )
    console.print(table)


def print_export(console: Console, made: LoraExport) -> None:
    """What an adapter lost of each tensor of its patch, and in total."""
    table = Table(title=f"LoRA adapter in {made.path}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("relative error", justify="right")
    for name, error in (*made.errors.items(), ("total", made.total_error)):
        table.add_row(name, f"{error:.4f}")
    console.print(table)


def _calibration_table(found: Mapping[str, Any]) -> Table:
    """Layers tried by short runs, and the one that was taken."""
    table = Table(title=f"layer, by short runs on validation ({found['looked_at']})")
    for column in ("layer", "hypervolume", "above retain 0"):
        table.add_column(column, justify="right")
    table.add_column("")
    for tried in found["tried"]:
        taken = tried["layer"] == found["layer"]
        numbers = (f"{tried[name]:.3f}" for name in ("hypervolume", "worth"))
        table.add_row(
            str(tried["layer"]),
            *numbers,
            "chosen" if taken else "",
            style="bold" if taken else None,
        )
    return table


def _times(n: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(n, f"{n} times")


def _scores_table(title: str, scores: Sequence[Score]) -> Table:
    table = Table(title=Text(title))
    roles = [role for role in ROLES if any(score.model == role for score in scores)]
    for column in ("score", *roles, "n", "split"):
        table.add_column(
            column, justify="left" if column == "score" else "right", no_wrap=column == "score"
        )
    for key in dict.fromkeys(score.key for score in scores):
        by_role = {score.model: score for score in scores if score.key == key}
        first = next(iter(by_role.values()))
        cells = [_value(by_role.get(role), interval=True) for role in roles]  # type: ignore[call-overload]
        table.add_row(Text(_label(first)), *cells, str(first.n), first.split)
    for reason in dict.fromkeys(score.reason for score in scores if score.reason):
        table.caption = Text(
            "\n".join(filter(None, [str(table.caption or ""), f"unscored: {reason}"]))
        )
    return table


def _label(score: Score) -> str:
    notes = [] if score.unit in ("fraction", score.name) else [score.unit]
    notes += [detail for detail in (score.prompts, score.scorer) if detail]
    if score.chance is not None:
        notes.append(f"chance {score.chance:.2f}")
    return score.name + (f" ({', '.join(notes)})" if notes else "")


def _value(score: Score | None, *, interval: bool = False) -> str:
    if score is None or score.value is None:
        return "unscored"
    if interval and score.ci_low is not None and score.ci_high is not None:
        return f"{score.value:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
    return f"{score.value:.3f}"


def _spread(spread: Spread) -> str:
    if spread.mean is None:
        return "unscored"
    return f"{spread.mean:.3f}" + ("" if spread.sd is None else f" ± {spread.sd:.3f}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"
