"""What was not measured, found in the records: a page that is silent about it would mislead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expunge.comparison import Cell, Comparison
from expunge.records import RunRecord
from expunge.report.shown import times

# Beside the seeds of one method, chance decides too much.
FEW_SEEDS = 3
# A record holds none of these yet; none of expunge's numbers is a guarantee against them.
NEVER = (
    "No attack was run: no relearning, no adversarial prompt, no quantisation, no decoding against "
    "the patch. Nothing here tells whether someone who tries can bring the function back.",
)


def unmeasured(comparison: Comparison, groups: Mapping[str, Sequence[Cell]]) -> tuple[str, ...]:
    """One sentence for each thing that a reader might expect and does not get."""
    records = [cell.record for cells in groups.values() for cell in cells if cell.record]
    found: list[str] = []
    empty = [record for record in records if not record.scores]
    if empty:
        found.append(f"{times(len(empty), 'run')} of {len(records)} without any score.")
    for row in (*comparison.rows, *comparison.interference):
        if row.missing:
            found.append(
                f"{row.method} on {row.function}: {times(row.missing, 'run')} missing or unscored."
            )
        if row.diverged:
            found.append(
                f"{row.method} on {row.function}: {times(row.diverged, 'run')} diverged; "
                "counted as nothing forgotten and nothing kept."
            )
    found += _gaps(comparison)
    few = {row.method: len(row.cells) for row in comparison.rows if len(row.cells) < FEW_SEEDS}
    if few:
        told = ", ".join(f"{method} ({n})" for method, n in few.items())
        found.append(f"Fewer than {FEW_SEEDS} seeds, so no telling how chance moves it: {told}.")
    if records and not comparison.tests:
        found.append("No method was tested against another: no p-value supports a ranking.")
    found += _missing_parts(records)
    return (*found, *NEVER)


def _gaps(comparison: Comparison) -> list[str]:
    methods = dict.fromkeys(row.method for row in comparison.rows)
    functions = dict.fromkeys(row.function for row in comparison.rows)
    there = {(row.method, row.function) for row in comparison.rows}
    gaps = [f"{m} on {f}" for m in methods for f in functions if (m, f) not in there]
    return [f"Not run: {', '.join(gaps)}."] if gaps else []


def _missing_parts(records: Sequence[RunRecord]) -> list[str]:
    """What single records lack, with in how many."""
    n = len(records)
    lacks = {
        "a retrained oracle, so no telling how far a model never taught the function is": [
            not any(score.model == "oracle" for score in r.scores) for r in records
        ],
        "values by example, so no paired test and no changed answers": [
            not r.values for r in records
        ],
        "losses by step": [
            not r.training.get("curve") and not r.training.get("parts") for r in records
        ],
        "probes fitted after the change, so no telling whether activations still hold it": [
            not r.training.get("probe_accuracy") for r in records
        ],
        "continuations to read": [not r.samples for r in records],
    }
    found = []
    for what, missing in lacks.items():
        if sum(missing):
            who = "any run" if sum(missing) == n else f"{sum(missing)} of {times(n, 'run')}"
            found.append(f"Not in the record of {who}: {what}.")
    reasons = dict.fromkeys(
        f"{score.name}: {score.reason}" for r in records for score in r.scores if score.reason
    )
    found += [f"Unscored: {reason}." for reason in reasons]
    splits = {score.split for r in records for score in r.scores} - {"test"}
    if splits:
        found.append(f"Measured on another split than test: {', '.join(sorted(splits))}.")
    return found
