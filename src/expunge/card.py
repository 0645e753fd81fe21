"""A model card for what a run made, in the Hub's format, from its record alone.

It says what was measured, on what, and how far that goes; it promises nothing. Names in a record
are hostile input as on a report: they are escaped, and of whole paths the last part is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from expunge.comparison import cell_of
from expunge.errors import DataError, RecipeError
from expunge.files import write_text
from expunge.presets import PRESETS
from expunge.records import RunRecord, Score, full_name
from expunge.report.groups import score_lines, slug_of
from expunge.report.settings import said, unplaced
from expunge.report.shown import percent, times, visible

CARD_NAME = "README.md"
# By this a card is known as one that may be replaced.
MARK = "<!-- expunge card -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SPECIAL = re.compile(r"[\\`*\[\]<>|#&~$]|(?<!\w)_|_(?!\w)")
METRICS = {"forget_accuracy": "accuracy", "retain_accuracy": "accuracy", "perplexity": "perplexity"}
# Settings that are the machine's, or that say where something lay.
NOT_TOLD = {"cache_gib", "device", "save_every"}


def card(
    record: RunRecord, *, adapter_error: float | None = None, base_model: str | None = None
) -> str:
    """The card as Markdown with its metadata.

    Args:
        adapter_error: what a LoRA adapter lost of the patch, as a share of its norm; None: the card
            is of the patch itself, or of a model that it was applied to.
        base_model: the base's name on the Hub. A record does not tell it from a folder's: without
            it, only a name that a preset knows is given as such.

    Raises:
        DataError: the record does not say by which recipe it was made.
        RecipeError: ``base_model`` is no name on the Hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base = _base(record) if base_model is None else _named(base_model)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="custom",
            dataset_name=_plain(f"{record.function}: {_measured_on(score)} ({score.n} examples)"),
            # Results on one set of data are put together by this.
            dataset_config=_plain(_measured_on(score)),
            dataset_split=score.split,
            metric_type=METRICS.get(score.name, score.name),
            metric_name=_metric(score),
            metric_value=score.value,
        )
        for score in record.scores
        if score.model == "patched" and score.value is not None
    ]
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers" if adapter_error is None else "peft",
        pipeline_tag="text-generation",
        tags=["expunge", "unlearning", f"removed-{slug_of(record.function)}"],
        model_name=_plain(_title(record)),
        eval_results=results or None,
    )
    # A name must not end the metadata, nor reach it with hidden characters.
    front = metadata.to_yaml(line_break="\n")
    body = "\n\n".join(part for part in _parts(record, adapter_error, base) if part)
    return f"---\n{front}\n---\n\n{MARK}\n\n{body}\n"


def save_card(text: str, path: Path, *, replace: bool = False) -> Path:
    """Write a card, atomically; ``path`` may be a folder.

    Raises:
        DataError: a README is there that expunge did not write, and ``replace`` is not set.
        ResourceError: the file cannot be written.
    """
    path = path / CARD_NAME if path.is_dir() else path
    if path.exists() and not replace:
        head = path.read_bytes().decode("utf-8", "replace")
        if MARK not in head:
            raise DataError(
                what="There is a README that expunge did not write",
                got=str(path),
                allowed="a new name, or that of an earlier card",
                fix="choose another -o, or give --replace if it may go",
            )
    write_text(path, text)
    return path


def record_beside(patch: Path) -> RunRecord:
    """The record of a run's folder, or beside a patch file. Raises DataError without one."""
    return RunRecord.load(patch if patch.is_dir() else patch.parent)


def _parts(record: RunRecord, adapter_error: float | None, base: str | None) -> Iterable[str]:
    yield f"# {_md(_title(record))}"
    yield _summary(record)
    if adapter_error is not None:
        yield (
            f"This is a LoRA adapter. It is a low-rank copy of the change that was measured and "
            f"lost {percent(adapter_error)} % of it (norm of what is lost against the norm of the "
            "change). **The numbers below are those of the exact change**, not of this adapter; "
            "measure the adapter before you rely on them."
        )
    yield "## What was removed"
    how = (
        f"a change to {times(len(record.provenance['base']), 'tensor')} of the base model, which "
        "is otherwise untouched."
        if record.provenance.get("base")
        else "something that acts while the model runs; no weights are changed."
    )
    yield f"The function *{_md(record.function)}*, with the method *{_md(record.objective)}*: {how}"
    yield "## Evidence"
    yield _evidence(record)
    yield "## Intended use"
    yield (
        "Research on unlearning, and uses where less of this function is wanted and where what is "
        "left of it does no harm. It is no safeguard by itself."
    )
    yield "## Limits"
    yield _limits(record)
    yield "## Provenance"
    yield _provenance(record, base)
    yield "## How to reproduce"
    yield _reproduce(record)


def _summary(record: RunRecord) -> str:
    cell = cell_of(record)
    lead = "Measured, not guaranteed"
    if cell.forget is None or cell.retain is None:
        return f"**{lead}**: this run has no full measurement, so nothing is claimed for it."
    return (
        f"**{lead}**: on held-back data, {percent(cell.forget)} % of what the base showed of "
        f"*{_md(cell.place.function)}* was gone, and {percent(cell.retain)} % of the worst of what "
        f"was to be kept was left. One run, seed {record.seed}."
    )


def _evidence(record: RunRecord) -> str:
    lines = score_lines(record)
    if not lines:
        return "No score was measured."
    rows = ["| score | base | changed | oracle | n | split |", "|---|---|---|---|---|---|"]
    for line in lines:
        first = line.first
        unit = "" if first.unit in ("fraction", first.name) else f", {first.unit}"
        chance = "" if first.chance is None else f", chance {first.chance:.2f}"
        name = _md(full_name(first.name, first.scorer, first.prompts)) + unit + chance
        cells = " | ".join(_cell(one) for one in line.scores)
        rows.append(f"| {name} | {cells} | {first.n} | {first.split} |")
    note = (
        "In brackets: 95 % interval over examples. They say nothing about other seeds. The oracle "
        "is a model that was never taught the function."
    )
    return "\n".join(rows) + "\n\n" + note


def _limits(record: RunRecord) -> str:
    found = [
        "No attack was run: relearning, adversarial prompts or quantisation may bring the function "
        "back.",
        "What was not asked was not measured: other wordings, other languages, longer talks.",
        "One run with one seed; another may differ.",
        "The base model's licence, limits and biases apply as before.",
    ]
    roles = {score.model for score in record.scores}
    if "oracle" not in roles:
        found.insert(1, "No retrained model was measured beside it, so the aim itself is unknown.")
    if not any(score.model == "patched" and score.value is not None for score in record.scores):
        found.insert(0, "It was not measured at all.")
    if record.training.get("collapsed") is not None:
        found.insert(0, "What was to be kept collapsed in training; an earlier state was taken.")
    taken = record.training.get("tradeoff", {}).get("chosen", {})
    if taken.get("other"):
        found.insert(0, "The change is the mean of two that were trained, taken by validation.")
    splits = {score.split for score in record.scores} - {"test"}
    if splits:
        found.insert(0, f"Measured on {', '.join(sorted(splits))}, which served for choices too.")
    return "\n".join(f"- {line}" for line in found)


def _provenance(record: RunRecord, base: str | None) -> str:
    told = record.provenance
    recipe = told.get("recipe") or {}
    facts: list[tuple[str, Any]] = [
        ("base model", base or recipe.get("model")),
        ("commit of expunge", told.get("commit")),
        ("packages", told.get("packages")),
        ("hardware", told.get("hardware")),
        ("seconds", {k: round(v, 1) for k, v in record.timing.items()}),
        ("readings of the splits", record.training.get("split_reads")),
    ]
    data = told.get("data")
    for name, digest in (data if isinstance(data, dict) else {}).items():
        facts.append((f"SHA-256 of {unplaced(str(name))}", digest))
    rows = [f"| {_md(name)} | {_md(said(value))} |" for name, value in facts if value]
    note = "" if base else "\n\nThe base is named as the recipe names it: a folder, or a Hub model."
    return "\n".join(["| fact | value |", "|---|---|", *rows]) + note


def _reproduce(record: RunRecord) -> str:
    made_of = composed_of(record)
    if made_of is not None:
        how = (
            "A random change as large as that of another run, as a yardstick: nothing was trained "
            "for it, and it was not meant to remove anything."
            if "control_of" in record.training
            else "Nothing was trained for this record: it measures a patch that other trainings "
            "left, or the sum of several. Each has a record and recipes of its own."
        )
        rows = [
            f"- {_md(name)}" + (f", SHA-256 of its patch {_md(said(one))}" if one else "")
            for name, one in made_of
        ]
        return "\n".join([f"{how} It is made of:\n", *rows]) if rows else how
    recipe = {k: v for k, v in record.provenance["recipe"].items() if k not in NOT_TOLD}
    text = yaml.safe_dump(_cut(recipe), sort_keys=False, allow_unicode=False, width=10**6)
    # In a fence the text is as it is; it must not close the fence.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return (
        "Save as `recipe.yaml`, put the data where it names them, and run "
        f"`expunge run recipe.yaml -o run`:\n\n{fence}yaml\n{text}{fence}"
    )


def composed_of(record: RunRecord) -> list[tuple[str, Any]] | None:
    """(folder, hash) of the patches that a patch was made of; None of one that its recipe made."""
    for name in ("parts", "control_of"):
        if name in record.training:
            told = record.training[name]
            hashes = told if isinstance(told, dict) else dict.fromkeys(map(str, told))
            return [(str(key), value) for key, value in hashes.items()]
    return None


def _cut(value: Any) -> Any:
    """Settings with whole paths cut, JSON-able as before."""
    if isinstance(value, dict):
        return {_plain(str(key)): _cut(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cut(one) for one in value]
    return _plain(unplaced(value)) if isinstance(value, str) else value


def _base(record: RunRecord) -> str | None:
    """The base's name on the Hub, if a preset knows it; ``models/mine`` may well be a folder."""
    name = str((record.provenance.get("recipe") or {}).get("model", ""))
    return name if any(name in preset.hub_names for preset in PRESETS.values()) else None


def _named(name: str) -> str:
    if not _HUB_NAME.fullmatch(name):
        raise RecipeError(
            what="That is no name of a model on the Hub",
            got=name,
            allowed="owner/name",
            fix="write it as on the Hub, or leave --base-model out",
        )
    return name


def _title(record: RunRecord) -> str:
    base = unplaced(str((record.provenance.get("recipe") or {}).get("model", ""))) or "a model"
    return f"{base.rsplit('/', 1)[-1]} without {record.function}, as far as measured"


def _measured_on(score: Score) -> str:
    side = score.name.partition("_")[0]
    return score.prompts or (side if side in ("forget", "retain") else "text")


def _metric(score: Score) -> str:
    aim = "lower" if score.higher_is == "worse" else "higher"
    return _plain(f"{full_name(score.name, score.scorer, score.prompts)} ({aim} is better)")


def _cell(score: Score | None) -> str:
    if score is None:
        return "—"
    if score.value is None:
        return "unscored"
    shown = f"{score.value:.3f}"
    if score.ci_low is None or score.ci_high is None:
        return shown
    return f"{shown} [{score.ci_low:.3f}, {score.ci_high:.3f}]"


def _plain(text: str) -> str:
    """One line without hidden characters."""
    return " ".join(visible(text, 500).split())


def _md(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", _plain(text))
